"""JPEG decoding and encoding by simplejpeg, or by Pillow where it is missing.

Both are libjpeg-turbo with the accurate transform and smooth chroma upsampling, so decoded pixels are the same. Either
releases the GIL meanwhile; Pillow takes longer an image (docs/log.md). What differs without simplejpeg:

- Pillow hides libjpeg's warnings: a file cut short is an error with both, but data damaged in a way that libjpeg
  repairs decodes, with wrong pixels from the damage on.
- Four-component JPEGs, which fastbyol-prep never stores, are refused as RGB.
- Below quality 96 simplejpeg encodes by the fast transform and Pillow by the accurate one: the coefficients differ by
  their rounding, and the pixels are as far from the original within 3 % (root mean square).
"""

from __future__ import annotations

import io
import logging
import struct
import threading
import zlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastbyol.beton import BetonError

if TYPE_CHECKING:
    from PIL import Image

_reason = ""
try:
    import simplejpeg
except ImportError as error:
    simplejpeg, _reason = None, str(error)

log = logging.getLogger(__name__)

# What Pillow's readers raise on damaged bytes, found by flipping bits in files of each format that is read here.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)
PILLOW_SUBSAMPLING = {"444": "4:4:4", "422": "4:2:2", "420": "4:2:0"}
_warn_permit = threading.Semaphore(1)  # taken by the first thread that says what is missing


class CodecMissing(BetonError):
    """Tell which package has to be installed before images can be read."""


def require_pillow() -> None:
    """Raise CodecMissing where Pillow cannot be imported; simplejpeg may be missing, Pillow may not."""
    try:
        import PIL.Image  # noqa: F401, PLC0415 - commands shall say in one line that it is missing
    except ImportError as error:
        raise CodecMissing(f"Pillow reads and writes images and is missing ({error}); pip install pillow") from error


def decode(data: bytes | memoryview, colorspace: str = "RGB") -> NDArray[np.uint8]:
    """Decode a whole JPEG to pixels [H, W, C], C as "RGB" or "CMYK" says; raise ValueError where it is damaged.

    CMYK is given as stored, which is inverted in Adobe's files.
    """
    if simplejpeg is None:
        _say_once()
        return _pixels(_opened(data, colorspace), colorspace)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace, strict=True)
    return pixels


def verify(data: bytes | memoryview) -> None:
    """Raise ValueError unless a whole JPEG decodes to RGB.

    It is decoded to about an eighth of each side, which reads every coefficient and so meets every fault a full decode
    meets (1500 damaged files: no difference) at 0.6 of its cost.
    """
    if simplejpeg is None:
        _say_once()
        image = _opened(data, "RGB")
        image.draft(None, (1, 1))
        _pixels(image, "RGB")
    else:
        simplejpeg.decode_jpeg(data, "RGB", strict=True, min_height=1, min_width=1, min_factor=8)


def decode_into(out: NDArray[np.uint8], data: bytes | memoryview) -> tuple[int, int]:
    """Decode a JPEG to the first bytes of out, uint8 [N], as RGB rows without gaps; return its height and width.

    Raises ValueError where it is damaged or larger than out.
    """
    if simplejpeg is not None:
        height, width, _ = simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape
        return height, width
    _say_once()
    image = _opened(data, "RGB")
    count = image.height * image.width * 3
    if count > out.size:
        raise ValueError(f"{image.width}x{image.height} pixels need {count} bytes, {out.size} are there")
    out[:count] = _pixels(image, "RGB").reshape(-1)
    return image.height, image.width


def encode(pixels: NDArray[np.uint8], *, quality: int, subsampling: str) -> bytes:
    """Encode RGB pixels [H, W, 3] as a baseline JPEG; quality 1 to 100, chroma subsampling "444", "422" or "420"."""
    if simplejpeg is None:
        _say_once()
        return _encode_by_pillow(pixels, quality=quality, subsampling=subsampling)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)
    return encoded


def _say_once() -> None:
    """Warn, the first time only, that a slower codec is used."""
    if _warn_permit.acquire(blocking=False):
        log.warning(
            "simplejpeg is missing (%s): Pillow decodes and encodes JPEGs, slower; pip install simplejpeg", _reason
        )


def _opened(data: bytes | memoryview, colorspace: str) -> Image.Image:
    """Read the header of a JPEG that decodes to this colour space; raise ValueError otherwise, as simplejpeg does."""
    from PIL.JpegImagePlugin import JpegImageFile  # noqa: PLC0415 - only where simplejpeg is missing

    try:
        image = JpegImageFile(io.BytesIO(data))
    except PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error
    if (image.mode == "CMYK") != (colorspace == "CMYK"):
        raise ValueError(f"{image.mode} cannot be decoded to {colorspace}")
    return image


def _pixels(image: Image.Image, colorspace: str) -> NDArray[np.uint8]:
    try:
        image.load()
    except PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error
    pixels: NDArray[np.uint8] = np.asarray(image if image.mode == colorspace else image.convert(colorspace))
    return 255 - pixels if colorspace == "CMYK" else pixels  # Pillow inverts all, in the belief that Adobe stored them


def _encode_by_pillow(pixels: NDArray[np.uint8], *, quality: int, subsampling: str) -> bytes:
    from PIL import Image  # noqa: PLC0415 - only where simplejpeg is missing

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality, subsampling=PILLOW_SUBSAMPLING[subsampling])
    return encoded.getvalue()
