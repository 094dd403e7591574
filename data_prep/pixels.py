"""Pixels of image files that are no JPEG: 8-bit RGB from any of Pillow's modes, orientation not yet undone.

Transparent pixels are blended with white, as a web page would show them. Gray of 16 or 32 bits, and floats from 0 to 1,
are mapped linearly to 0 to 255, or stretched between percentiles of the image; of 16-bit colour Pillow keeps the high
byte, which differs by one level at most. Of an animation the first frame is used.
"""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data_prep.formats import FormatMissing, load_plugin
from fastbyol.jpeg import PILLOW_ERRORS

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION_TAG = 0x0112
TIFF_SAMPLES, TIFF_PHOTOMETRIC, TIFF_EXTRA_SAMPLES = 277, 262, 338
TIFF_CMYK, TIFF_ALPHA = 5, (1, 2)


class PixelError(ValueError):
    """Bytes whose pixels cannot be had; the message has the reason."""


def silence_decoders() -> None:
    """Silence Pillow's warnings and log, and libtiff's lines: they concern images refused, or metadata not used."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    from PIL import _imaging  # noqa: F401, PLC0415 - loads libtiff, if Pillow has one

    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libtiff" in line}
    for path in mapped:  # libtiff prints to stderr by itself; each library has one handler for errors, one for warnings
        library = ctypes.CDLL(path)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            getattr(library, name)(None)


@contextmanager
def truncated_files(*, are_read: bool) -> Iterator[None]:
    """Let Pillow return what decodes of cut files inside the with-block, in every thread."""
    from PIL import ImageFile  # noqa: PLC0415 - so that a missing Pillow is one line

    ImageFile.LOAD_TRUNCATED_IMAGES = are_read
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def decode(
    data: bytes, kind: str, *, max_pixels: int, stretch: tuple[float, float] | None
) -> tuple[NDArray[np.uint8], int]:
    """Return pixels [H, W, 3] and the EXIF orientation of an image of one of Pillow's formats.

    stretch: percentiles of a deep gray image that become black and white. Raises PixelError.
    """
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - so that a missing Pillow is one line

    try:
        load_plugin(kind)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            refuse_bomb(image.width, image.height, max_pixels)
            _refuse_unknown_channels(image)
            image.load()
            return _rgb(image, stretch), exif_orientation(image)
    except (PixelError, FormatMissing) as error:
        raise PixelError(str(error)) from error
    except UnidentifiedImageError as error:
        raise PixelError(f"damaged {kind}: its header cannot be read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PixelError(f"decompression bomb: {error}") from error
    except (*PILLOW_ERRORS, RuntimeError, MemoryError) as error:  # the latter two of plugins
        raise PixelError(f"damaged {kind}: {' '.join(str(error).split()).partition('. ')[0]}") from error


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the EXIF block cannot be parsed."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except PILLOW_ERRORS:
        return 1


def jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG; raise PixelError for a header that Pillow cannot read."""
    from PIL import Image  # noqa: PLC0415 - as above

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return exif_orientation(image)
    except PILLOW_ERRORS as error:
        raise PixelError(f"damaged JPEG header: {error}") from error


def refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    """Raise PixelError for more pixels than a decoder should be given."""
    if width * height > max_pixels:
        raise PixelError(
            f"decompression bomb: {width}x{height} pixels; at most {max_pixels} are decoded; give a larger --max-pixels"
        )


def _refuse_unknown_channels(image: Image.Image) -> None:
    """Raise PixelError for a TIFF with more channels than colour and declared alpha, such as infrared."""
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    samples = tags.get(TIFF_SAMPLES, 1)
    extra = tags.get(TIFF_EXTRA_SAMPLES, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    if samples >= 4 and tags.get(TIFF_PHOTOMETRIC) != TIFF_CMYK and not (samples == 4 and set(extra) & set(TIFF_ALPHA)):
        raise PixelError(f"{samples} channels, which are neither CMYK nor RGB with alpha; convert it to RGB")


def _rgb(image: Image.Image, stretch: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Return pixels [H, W, 3] of a loaded image in any of Pillow's modes."""
    from PIL import Image  # noqa: PLC0415 - as above

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        gray = _eight_bits(np.asarray(image), stretch)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels: NDArray[Any] = np.asarray(image.convert("RGB"))
    return pixels


def _eight_bits(levels: NDArray[Any], stretch: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Map deep gray levels to 8 bits: linearly over the range of their type, or between percentiles."""
    is_float = levels.dtype.kind == "f"
    if is_float and not np.isfinite(levels).all():
        raise PixelError("gray levels with inf or NaN; replace them")
    if stretch is not None:
        low, high = np.percentile(levels, stretch)
        scaled = (levels.astype(np.float64) - low) / max(high - low, np.finfo(np.float64).tiny)
        stretched: NDArray[np.uint8] = (scaled.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        return stretched
    if levels.dtype.itemsize == 2:
        return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if is_float:
        lowest, highest = float(levels.min()), float(levels.max())
        if lowest < 0.0 or highest > 1.0:
            raise PixelError(f"gray levels from {lowest:g} to {highest:g}, wanted 0 to 1; give --stretch")
        return (levels.astype(np.float64) * 255.0 + 0.5).astype(np.uint8)
    highest = int(levels.astype(np.int64).max()) % 2**32
    if 0 < highest < 2**24:
        raise PixelError(f"32-bit gray levels up to {highest}, all black of {2**32 - 1}; give --stretch")
    shifted: NDArray[np.int64] = levels.astype(np.int64) % 2**32 >> 24
    return shifted.astype(np.uint8)
