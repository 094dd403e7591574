"""JPEG decoding and encoding by simplejpeg, or by Pillow where it is missing.

Both use libjpeg-turbo with the accurate transform and smooth chroma upsampling, so their decoded pixels are the same.
Both release the GIL while they work; Pillow is slower (docs/log.md). The differences without simplejpeg:

- Pillow hides libjpeg's warnings: a truncated file is an error with both, but data damaged in a way that libjpeg
  repairs decodes, with wrong pixels from the damage on.
- Four-component JPEGs, which fastbyol-prep never stores, do not decode as RGB.
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
SIDE_MAX = 65500  # of libjpeg
PILLOW_SUBSAMPLING = {"444": "4:4:4", "422": "4:2:2", "420": "4:2:0"}
_warn_permit = threading.Semaphore(1)  # acquired by the first thread to warn


class CodecMissing(BetonError):
    """A package that reads images is missing; the message names it."""


class UnknownSubsampling(ValueError):
    """Chroma in a proportion that simplejpeg does not read, such as 4:1:0."""


def require_pillow() -> None:
    """Raise CodecMissing where Pillow cannot be imported; simplejpeg is optional."""
    try:
        import PIL.Image  # noqa: F401, PLC0415 - so that commands report a missing Pillow in one line
    except ImportError as error:
        raise CodecMissing(
            f"Pillow, which reads and writes images, cannot be imported ({error}); pip install pillow"
        ) from error


def decode(
    data: bytes | memoryview,
    colorspace: str = "RGB",
    *,
    least: tuple[int, int] | None = None,
    is_strict: bool = True,
) -> NDArray[np.uint8]:
    """Decode a JPEG to pixels [H, W, C] in colour space "RGB" or "CMYK"; raise ValueError where it is damaged.

    CMYK is returned as stored, which is inverted in Adobe's files. least: a height and width; the sides are divided by
    the largest of 1, 2, 4 and 8 that leaves so many pixels. is_strict: libjpeg's warnings are errors; else what decodes
    is returned. Raises UnknownSubsampling for chroma that simplejpeg does not read.
    """
    if simplejpeg is None:
        _warn_once()
        return decode_by_pillow(data, colorspace, least=least)
    height, width = least or (0, 0)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, colorspace, strict=is_strict, min_height=height, min_width=width
        )
    except ValueError as error:
        if "subsampling" in str(error):
            raise UnknownSubsampling(str(error)) from error
        raise
    return pixels


def decode_by_pillow(
    data: bytes | memoryview, colorspace: str = "RGB", *, least: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG as decode() does, by Pillow, which hides libjpeg's warnings but knows every chroma subsampling."""
    image = _open(data, colorspace)
    if least is not None:
        image.draft(None, (least[1] - 1 or 1, least[0] - 1 or 1))  # Pillow rounds the scale down
    return _decode_image(image, colorspace)


def verify(data: bytes | memoryview) -> None:
    """Raise ValueError unless a JPEG decodes to RGB.

    It is decoded at about an eighth of each side, which reads every coefficient and so finds every error that a full
    decode finds (1500 damaged files: no difference) at 0.6 of its cost.
    """
    if simplejpeg is None:
        _warn_once()
        image = _open(data, "RGB")
        image.draft(None, (1, 1))
        _decode_image(image, "RGB")
    else:
        simplejpeg.decode_jpeg(data, "RGB", strict=True, min_height=1, min_width=1, min_factor=8)


def decode_into(out: NDArray[np.uint8], data: bytes | memoryview) -> tuple[int, int]:
    """Decode a JPEG as contiguous RGB rows into the start of out, uint8 [N]; return its height and width.

    Raises ValueError where it is damaged or larger than out.
    """
    if simplejpeg is not None:
        height, width, _ = simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape
        return height, width
    _warn_once()
    image = _open(data, "RGB")
    count = image.height * image.width * 3
    if count > out.size:
        raise ValueError(f"{image.width}x{image.height} pixels need {count} bytes, the buffer has {out.size}")
    out[:count] = _decode_image(image, "RGB").reshape(-1)
    return image.height, image.width


def encode(pixels: NDArray[np.uint8], *, quality: int, subsampling: str) -> bytes:
    """Encode RGB pixels [H, W, 3] as a baseline JPEG; quality 1 to 100, chroma subsampling "444", "422" or "420"."""
    if simplejpeg is None:
        _warn_once()
        return _encode_by_pillow(pixels, quality=quality, subsampling=subsampling)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)
    return encoded


def _warn_once() -> None:
    """Warn, the first time only, that the slower codec is used."""
    if _warn_permit.acquire(blocking=False):
        log.warning(
            "simplejpeg is missing (%s): Pillow, which is slower, decodes and encodes JPEGs; pip install simplejpeg",
            _reason,
        )


def _open(data: bytes | memoryview, colorspace: str) -> Image.Image:
    """Read a JPEG's header; raise ValueError, as simplejpeg does, where it does not decode to the colour space."""
    from PIL.JpegImagePlugin import JpegImageFile  # noqa: PLC0415 - only where simplejpeg is missing

    try:
        image = JpegImageFile(io.BytesIO(data))
    except PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error
    if (image.mode == "CMYK") != (colorspace == "CMYK"):
        raise ValueError(f"{image.mode} cannot be decoded to {colorspace}")
    return image


def _decode_image(image: Image.Image, colorspace: str) -> NDArray[np.uint8]:
    try:
        image.load()
    except PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error
    pixels: NDArray[np.uint8] = np.asarray(image if image.mode == colorspace else image.convert(colorspace))
    return 255 - pixels if colorspace == "CMYK" else pixels  # Pillow inverts every CMYK file, as if it were Adobe's


def _encode_by_pillow(pixels: NDArray[np.uint8], *, quality: int, subsampling: str) -> bytes:
    from PIL import Image  # noqa: PLC0415 - only where simplejpeg is missing

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality, subsampling=PILLOW_SUBSAMPLING[subsampling])
    return encoded.getvalue()
