"""Pixels of image files that are no JPEG: 8-bit RGB from any of Pillow's modes, orientation not yet undone.

Transparent pixels are blended with white, as a web page would show them. Gray of 16 or 32 bits, and floats from 0 to 1,
are mapped linearly to 0 to 255, or stretched between percentiles of the image; of 16-bit colour Pillow keeps the high
byte, which differs by one level at most. Of an animation the first frame is used.
"""

from __future__ import annotations

import ctypes
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data_prep import jxl
from fastbyol.data_prep.formats import ImageError, load_plugin
from fastbyol.jpeg import PILLOW_ERRORS

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION_TAG = 0x0112
TIFF_SAMPLES, TIFF_PHOTOMETRIC, TIFF_EXTRA_SAMPLES, TIFF_SAMPLE_FORMAT = 277, 262, 338, 339
UNSIGNED = 1  # sample format
TIFF_CMYK, TIFF_ALPHA = 5, (1, 2)


def silence_decoders() -> None:
    """Silence Pillow's warnings and log, and libtiff's lines: they concern images refused, or metadata not used."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    from PIL import _imaging  # noqa: F401, PLC0415 - loads libtiff, if Pillow has one

    lines = Path("/proc/self/maps").read_text().splitlines()
    for path in {line.split(maxsplit=5)[5] for line in lines if "/libtiff" in line}:
        # libtiff prints to stderr by itself, unless its handlers are taken away
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(path)
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)


class _OfThread(threading.local):
    """A value for Pillow's flag of truncated files that is true only where a thread sets it."""

    is_set = False

    def __bool__(self) -> bool:
        return self.is_set


_reads_truncated = _OfThread()


@contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Set Pillow's own limit of pixels, which also holds for images inside others, for the with-block."""
    from PIL import Image, ImageFile  # noqa: PLC0415 - so that a missing Pillow is one line

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS = max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = _reads_truncated  # type: ignore[assignment]  # is asked for its truth only
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode(
    data: bytes, kind: str, *, max_pixels: int, stretch: tuple[float, float] | None, keeps_damaged: bool = False
) -> tuple[NDArray[np.uint8], int, str]:
    """Return pixels [H, W, 3], the EXIF orientation, and what is damaged of an image of one of Pillow's formats.

    stretch: percentiles of a deep gray image that become black and white. keeps_damaged: inside pillow_limits, return
    what decodes of a damaged file, and the fault; else raise ImageError, as for everything that cannot be read.
    """
    try:
        return *_decode(data, kind, max_pixels=max_pixels, stretch=stretch), ""
    except ImageError as error:
        if not keeps_damaged:
            raise
        _reads_truncated.is_set = True
        try:
            return *_decode(data, kind, max_pixels=max_pixels, stretch=stretch), str(error)
        finally:
            _reads_truncated.is_set = False


def _decode(
    data: bytes, kind: str, *, max_pixels: int, stretch: tuple[float, float] | None
) -> tuple[NDArray[np.uint8], int]:
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - as above

    try:
        load_plugin(kind)
        if kind == "JXL":
            size = jxl.read_size(data)
            if size is None:
                raise ImageError("damaged JPEG XL: no size in its header")
            refuse_bomb(*size, max_pixels)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            refuse_bomb(image.width, image.height, max_pixels)
            _refuse_unknown_channels(image)
            is_unsigned = getattr(image, "tag_v2", {}).get(TIFF_SAMPLE_FORMAT, UNSIGNED) in (UNSIGNED, (UNSIGNED,))
            image.load()
            return _rgb(image, stretch, is_unsigned=is_unsigned), exif_orientation(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"damaged {kind}: its header cannot be read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"decompression bomb: {error}; give a larger --max-pixels") from error
    except (*PILLOW_ERRORS, RuntimeError, MemoryError) as error:  # the latter two of plugins
        raise ImageError(f"damaged {kind}: {' '.join(str(error).split()).partition('. ')[0]}") from error


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the EXIF block cannot be parsed."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except PILLOW_ERRORS:
        return 1


def jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG; raise ImageError for a header that Pillow cannot read."""
    from PIL.JpegImagePlugin import JpegImageFile  # noqa: PLC0415 - as above

    try:
        with JpegImageFile(io.BytesIO(data)) as image:  # not Image.open, which compares pixels that are not decoded
            return exif_orientation(image)
    except PILLOW_ERRORS as error:
        raise ImageError(f"damaged JPEG header: {error}") from error


def refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError for more pixels than a decoder should be given."""
    if width * height > max_pixels:
        raise ImageError(
            f"decompression bomb: {width}x{height} pixels; at most {max_pixels} are decoded; give a larger --max-pixels"
        )


def _refuse_unknown_channels(image: Image.Image) -> None:
    """Raise ImageError for a TIFF with more channels than colour and declared alpha, such as infrared."""
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    samples = tags.get(TIFF_SAMPLES, 1)
    extra = tags.get(TIFF_EXTRA_SAMPLES, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    if samples >= 4 and tags.get(TIFF_PHOTOMETRIC) != TIFF_CMYK and not (samples == 4 and set(extra) & set(TIFF_ALPHA)):
        raise ImageError(f"{samples} channels, which are neither CMYK nor RGB with alpha; convert it to RGB")


def _rgb(image: Image.Image, stretch: tuple[float, float] | None, *, is_unsigned: bool) -> NDArray[np.uint8]:
    """Return pixels [H, W, 3] of a loaded image in any of Pillow's modes; is_unsigned: what 32-bit levels are."""
    from PIL import Image  # noqa: PLC0415 - as above

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        levels = np.asarray(image)
        if image.format == "PPM" and image.mode == "I":
            levels = levels.astype(np.uint16)
        elif image.mode == "I" and is_unsigned:
            levels = levels.astype(np.int32).view(np.uint32)  # as they were before Pillow gave them a sign
        return np.repeat(_eight_bits(levels, stretch)[..., None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels: NDArray[Any] = np.asarray(image.convert("RGB"))
    return pixels


def _eight_bits(levels: NDArray[Any], stretch: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Map deep gray levels to 8 bits: linearly over the range of their type from 0, or between percentiles."""
    is_float = levels.dtype.kind == "f"
    if is_float and not np.isfinite(levels).all():
        raise ImageError("gray levels with inf or NaN; replace them")
    if stretch is not None:
        low, high = np.percentile(levels, stretch)
        scaled = (levels.astype(np.float64) - low) / max(high - low, np.finfo(np.float64).tiny)
        stretched: NDArray[np.uint8] = (scaled.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        return stretched
    if levels.dtype.itemsize == 2:
        return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    lowest, highest = float(levels.min()), float(levels.max())
    largest = 1.0 if is_float else float(np.iinfo(levels.dtype).max)
    if lowest < 0.0 or highest > largest:
        raise ImageError(f"gray levels from {lowest:g} to {highest:g}, wanted 0 to {largest:g}; give --stretch")
    if 0.0 < highest < largest / 255:
        raise ImageError(f"gray levels up to {highest:g}, which are black beside {largest:g}; give --stretch")
    linear: NDArray[np.uint8] = (levels.astype(np.float64) * (255.0 / largest) + 0.5).astype(np.uint8)
    return linear
