"""Conversion of image files to what a .beton stores: upright 8-bit RGB of limited size, as JPEG or raw pixels.

Transparent pixels are blended with white, as a web page would show them. 16-bit grayscale is divided by 257; of 16-bit
colour Pillow keeps the high byte, which differs by one level at most. Of an animation the first frame is used.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbyol import beton, jpeg
from fastbyol.data_prep.settings import PIXELS_MAX, Settings
from fastbyol.jpeg import PILLOW_ERRORS

if TYPE_CHECKING:
    from PIL import Image

# JPEG has its own decoder. EPS, PDF and the like would run other programs, so only plain pixel formats are opened.
PILLOW_FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF")
ORIENTATION_TAG = 0x0112
SOI = b"\xff\xd8"  # every JPEG starts with it


class ImageError(ValueError):
    """Bytes that are not an image which can be stored; the message has the reason."""


@dataclass(frozen=True)
class _JpegHeader:
    """The content of the markers before the first scan; `frame` is the SOF marker's second byte, C0 for baseline."""

    frame: int
    precision: int
    width: int
    height: int
    components: int
    has_exif: bool
    is_adobe: bool


def silence_pillow() -> None:
    """Silence Pillow's warnings and log: they concern images refused here, or metadata that is not used."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def prepare(data: bytes, settings: Settings) -> beton.StoredImage:
    """Convert the bytes of one image file according to the settings; the image is decoded completely in any case.

    Raises ImageError for bytes that are not a supported image, are damaged or cut short, or decode to over 89 Mpx.
    """
    if not data:
        raise ImageError("empty: no bytes")
    if data[:2] == SOI:
        header = _jpeg_header(data)
        orientation = _jpeg_orientation(data) if header.has_exif else 1
        if settings.mode == "passthrough" and orientation == 1 and _can_pass_through(data, header, settings):
            _check_jpeg(data, header)
            return beton.StoredImage(beton.JPEG, header.width, header.height, data)
        pixels = _decode_jpeg(data, header)
    else:
        pixels, orientation = _decode(data)
    pixels = np.ascontiguousarray(shrink(upright(pixels, orientation), settings.max_side))
    height, width = pixels.shape[:2]
    if settings.wants_raw(data):
        return beton.StoredImage(beton.RAW, width, height, pixels.tobytes())
    # 4:2:0 is used by cameras, ImageNet and FFCV, and decodes fastest.
    encoded = jpeg.encode(pixels, quality=settings.quality, subsampling="420")
    return beton.StoredImage(beton.JPEG, width, height, encoded)


def check_stored(data: bytes | memoryview, *, mode: int, width: int, height: int) -> None:
    """Raise ImageError unless a stored image decodes without a warning to the size in its record."""
    if mode == beton.RAW:
        return
    header = _jpeg_header(data)
    if (header.width, header.height) != (width, height):
        raise ImageError(f"the JPEG is {header.width}x{header.height}, its record has {width}x{height}")
    _check_jpeg(data, header)


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


def _can_pass_through(data: bytes, header: _JpegHeader, settings: Settings) -> bool:
    """Return whether this JPEG can be stored unchanged: baseline, 8 bit, three components, small enough."""
    plain = (header.frame, header.precision, header.components) == (0xC0, 8, 3)
    return plain and max(header.width, header.height) <= settings.max_side and len(data) <= settings.page_bytes


def _jpeg_header(data: bytes | memoryview) -> _JpegHeader:
    """Read the markers up to the first scan (ITU T.81, annex B)."""
    if data[:2] != SOI:
        raise ImageError("not a JPEG: no start marker")
    place, frame, body, has_exif, is_adobe = 2, 0, b"", False, False
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            raise ImageError("not a JPEG: a marker is missing before the first scan")
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker == 0xDA:  # the scan
            break
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        start = bytes(data[place + 4 : place + 2 + min(length, 19)])
        has_exif |= marker == 0xE1 and start.startswith(b"Exif\0\0")
        is_adobe |= marker == 0xEE and start.startswith(b"Adobe")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, body = marker, start
        place += 2 + length
    if len(body) < 6:
        raise ImageError("not a JPEG: no frame header")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    _refuse_bomb(width, height)
    return _JpegHeader(frame, precision, width, height, components, has_exif, is_adobe)


def _jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG."""
    from PIL import Image  # noqa: PLC0415 - so that fastbyol-prep can report in one line that Pillow is missing

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except PILLOW_ERRORS as error:
        raise ImageError(f"damaged JPEG header: {error}") from error


def _decode_jpeg(data: bytes, header: _JpegHeader) -> NDArray[np.uint8]:
    """Return pixels [H, W, 3], not yet turned upright."""
    if header.components != 4:
        return _strict_jpeg(data, "RGB")
    # libjpeg returns CMYK as stored; Adobe stores it inverted, so that 255 means no ink.
    ink = _strict_jpeg(data, "CMYK").astype(np.uint32)
    light = ink if header.is_adobe else 255 - ink
    return ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)


def _check_jpeg(data: bytes | memoryview, header: _JpegHeader) -> None:
    """Raise ImageError unless the whole JPEG decodes to RGB, which the loaders need."""
    if header.components not in (1, 3):
        raise ImageError(f"the JPEG has {header.components} components; loaders decode gray and colour")
    try:
        jpeg.verify(data)
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error


def _strict_jpeg(data: bytes | memoryview, colorspace: str) -> NDArray[np.uint8]:
    """Decode a JPEG; libjpeg's warnings (premature end, bad Huffman code) are errors here."""
    try:
        return jpeg.decode(data, colorspace)
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if the EXIF block cannot be parsed."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except PILLOW_ERRORS:
        return 1


def _decode(data: bytes) -> tuple[NDArray[np.uint8], int]:
    """Return pixels [H, W, 3] and the EXIF orientation of an image that is not a JPEG."""
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - as above

    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            _refuse_bomb(image.width, image.height)
            image.load()
            return _rgb(image), _orientation(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in a known format (JPEG, {', '.join(PILLOW_FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"decompression bomb: {error}") from error
    except PILLOW_ERRORS as error:
        raise ImageError(f"damaged image: {error}") from error


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return pixels [H, W, 3] of a loaded image in any of Pillow's 8-bit modes or 16-bit grayscale."""
    from PIL import Image  # noqa: PLC0415 - so that fastbyol-prep can report in one line that Pillow is missing

    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        gray = ((levels + 128) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ImageError("32 bits per pixel; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels: NDArray[Any] = np.asarray(image.convert("RGB"))
    return pixels


def _refuse_bomb(width: int, height: int) -> None:
    """Raise ImageError for more pixels than a decoder should be given."""
    if width * height > PIXELS_MAX:
        raise ImageError(f"decompression bomb: {width}x{height} pixels; at most {PIXELS_MAX} are decoded")
