"""Conversion of image files to what a .beton stores: upright 8-bit RGB of limited size, as JPEG or raw pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastbyol import beton, jpeg
from fastbyol.data_prep import jpegs, pixels
from fastbyol.data_prep.formats import LOSSLESS, ImageError, format_of
from fastbyol.data_prep.settings import Settings

KNOWN = "JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, AVIF, JPEG 2000, ICO, TGA, HEIC or JPEG XL"


def prepare(data: bytes, settings: Settings, *, name: str = "", notes: list[str] | None = None) -> beton.StoredImage:
    """Convert the bytes of one image file according to the settings; the image is decoded completely in any case.

    name: the file's, by which alone a TGA is known. What was repaired, or is kept of a damaged file with
    settings.keeps_damaged, is added to `notes`. Raises ImageError for bytes that are not a supported image, are damaged
    or cut short, or decode to more than settings.max_pixels.
    """
    if not data:
        raise ImageError("empty: no bytes")
    kind = "JPEG" if data[:2] == jpegs.SOI else format_of(data, name)
    if kind is None:
        raise ImageError(f"not an image in a known format ({KNOWN})")
    notes = [] if notes is None else notes
    if kind == "JPEG":
        return _prepare_jpeg(data, settings, notes)
    decoded, orientation, fault = pixels.decode(
        data,
        kind,
        max_pixels=settings.max_pixels,
        stretch=settings.stretch,
        keeps_damaged=settings.keeps_damaged,
    )
    if fault:
        notes.append(f"kept what decodes: {fault}")
    return _store(decoded, orientation, data, settings, is_lossless=kind in LOSSLESS)


def _prepare_jpeg(data: bytes, settings: Settings, notes: list[str]) -> beton.StoredImage:
    orientation = pixels.jpeg_orientation(data) if data.find(b"Exif\0\0", 0, 1 << 16) >= 0 else 1
    passed = _pass_through(data, settings) if orientation == 1 else None
    if passed is not None:
        return passed
    try:
        decoded, repaired = jpegs.decode(data, max_pixels=settings.max_pixels, max_side=settings.max_side)
    except jpegs.TooLarge:
        raise
    except ImageError as error:
        if not settings.keeps_damaged:
            raise
        decoded = jpegs.decode_what_is_there(data, max_pixels=settings.max_pixels)
        repaired = f"kept what decodes: {error}"
    if repaired:
        notes.append(repaired)
    return _store(decoded, orientation, data, settings, is_lossless=False)


def _pass_through(data: bytes, settings: Settings) -> beton.StoredImage | None:
    """Return a whole JPEG as it is, if the settings and the loaders allow that: small, baseline, 8 bit, in colour.

    It is left without what keeps hardware from decoding it.
    """
    if settings.mode not in ("passthrough", "auto"):
        return None
    try:
        data = jpegs.without_makers_data(data)
        header = jpegs.read_header(data)
        largest = max(header.width, header.height)
        if largest > settings.max_side or len(data) > settings.page_bytes or not settings.is_small(largest):
            return None
        if (header.frame, header.precision, header.components) != (0xC0, 8, 3):
            return None
        jpegs.check(data, header)
    except ImageError:  # decoding tells whether it can be repaired
        return None
    return beton.StoredImage(beton.JPEG, header.width, header.height, data)


def _store(
    decoded: NDArray[np.uint8], orientation: int, data: bytes, settings: Settings, *, is_lossless: bool
) -> beton.StoredImage:
    """Store pixels [H, W, 3], after turning them upright and shrinking them."""
    upright_pixels = np.ascontiguousarray(shrink(upright(decoded, orientation), settings.max_side))
    height, width = upright_pixels.shape[:2]
    if settings.wants_raw(data, side=max(height, width), is_lossless=is_lossless):
        if upright_pixels.nbytes > settings.page_bytes:
            raise ImageError(
                f"{width}x{height} pixels do not fit a page of {settings.page_bytes} bytes; give --max-side"
            )
        return beton.StoredImage(beton.RAW, width, height, upright_pixels.tobytes())
    if max(height, width) > jpeg.SIDE_MAX:
        raise ImageError(
            f"{width}x{height} pixels; a JPEG side has at most {jpeg.SIDE_MAX}; give --max-side, or --mode raw"
        )
    # 4:2:0 is used by cameras, ImageNet and FFCV, and decodes fastest.
    encoded = jpeg.encode(upright_pixels, quality=settings.quality, subsampling="420")
    return beton.StoredImage(beton.JPEG, width, height, encoded)


def check_stored(data: bytes | memoryview, *, mode: int, width: int, height: int) -> None:
    """Raise ImageError unless a stored image decodes without a warning to the size in its record."""
    if mode == beton.RAW:
        return
    header = jpegs.read_header(data)
    if (header.width, header.height) != (width, height):
        raise ImageError(f"the JPEG is {header.width}x{header.height}, its record has {width}x{height}")
    jpegs.check(data, header)


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation (1 to 8, CIPA DC-008) of pixels [H, W, 3]; ignore any other value."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def shrink(pixels: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """Shrink pixels [H, W, 3] by Lanczos to a longest side of max_side; never enlarge."""
    from PIL import Image  # noqa: PLC0415 - so that fastbyol-prep can report in one line that Pillow is missing

    height, width = pixels.shape[:2]
    longest = max(height, width)
    if longest <= max_side:
        return pixels
    size = (max(1, round(width * max_side / longest)), max(1, round(height * max_side / longest)))
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS))
