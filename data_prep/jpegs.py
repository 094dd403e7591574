"""JPEG files: their headers, exact decoding, and the repair of markers that leave every pixel whole."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastbyol import jpeg
from fastbyol.data_prep.formats import ImageError

SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # every JPEG starts and ends with them
SOS, APP0, APP14 = 0xDA, 0xE0, 0xEE
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), (0xC2, 0xC6, 0xCA, 0xCE)  # frames
NOT_FRAMES = (0xC4, 0xC8, 0xCC)
TABLES = (0xC4, 0xCC, 0xDB, 0xDD)  # Huffman and arithmetic coding, quantisation, restart interval
ADOBE_YCC = 1  # colour transform of three components
PIXELS_PER_BYTE_MAX = 256  # the least a scan can take is 12 bits for 16 x 16 pixels
SCALES = (1, 2, 4, 8)  # by which libjpeg can divide the sides while it decodes
COMMON_DATA = {  # application data that every decoder passes over, by marker and how it begins
    APP0: (b"JFIF\0", b"JFXX\0"),
    0xE1: (b"Exif\0", b"http://ns.adobe.com/"),
    0xE2: (b"ICC_PROFILE\0",),
    0xEC: (b"Ducky",),
    0xED: (b"Photoshop ", b"Adobe_"),
    APP14: (b"Adobe",),
}


class TooLarge(ImageError):
    """More pixels than are decoded."""


@dataclass(frozen=True)
class Header:
    """The content of the markers before the first scan; `frame` is the SOF marker's second byte, C0 for baseline."""

    frame: int
    precision: int
    width: int
    height: int
    components: int
    is_adobe: bool


def read_header(data: bytes | memoryview) -> Header:
    """Read the markers up to the first scan (ITU T.81, annex B)."""
    if data[:2] != SOI:
        raise ImageError("not a JPEG: no start marker")
    frame, body, is_adobe = 0, b"", False
    for marker, place, length in _segments(data, is_strict=True):
        start = bytes(data[place + 4 : place + 2 + min(length, 19)])
        is_adobe |= marker == APP14 and start.startswith(b"Adobe")
        if 0xC0 <= marker <= 0xCF and marker not in NOT_FRAMES:
            frame, body = marker, start
    if len(body) < 6:
        raise ImageError("not a JPEG: no frame header")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    return Header(frame, precision, width, height, components, is_adobe)


def _segments(data: bytes | memoryview, *, is_strict: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, position, length) of the segments before the first scan, then of the scan's own header.

    Strict: raises ImageError for bytes between them, which are skipped else.
    """
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            if is_strict:
                raise ImageError("not a JPEG: a marker is missing before the first scan")
            place += 1
            continue
        marker = data[place + 1]
        if marker == 0xFF or (not is_strict and marker == 0):  # fill byte
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, place, length
        if marker == SOS:
            return
        place += 2 + length


def repair(data: bytes, *, cut_padding: bool) -> bytes | None:
    """Rewrite a file with only the markers that a decoder needs, as the standard wants them; None where that fails.

    Left out are application data, comments, and bytes between markers; the parameters of a sequential scan, JFIF's
    version and Adobe's transform are set right. The scan's data stays, up to padding before the end marker.
    """
    end = data.rfind(EOI)
    if data[:2] != SOI or end < 0:
        return None
    parts, frame = [SOI], 0
    for marker, place, length in _segments(data, is_strict=False):
        segment = data[place : place + 2 + length]
        if marker == SOS:
            if frame in SEQUENTIAL:
                segment = segment[:-3] + b"\0\x3f\0"  # all 64 coefficients, at once
            scan = data[place + 2 + length : end]
            return b"".join([*parts, segment, _without_padding(scan) if cut_padding else scan, EOI])
        if marker == APP0 and segment[4:9] == b"JFIF\0":
            parts.append(b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")
        elif marker == APP14 and segment[4:9] == b"Adobe" and len(segment) >= 16:
            transform = segment[15]
            parts.append(segment[:15] + bytes([ADOBE_YCC if transform == 2 and _components(data) == 3 else transform]))
        elif marker in TABLES:
            parts.append(segment)
        elif 0xC0 <= marker <= 0xCF and marker not in NOT_FRAMES:
            frame = marker
            parts.append(segment)
    return None


def without_makers_data(data: bytes) -> bytes:
    """Leave out the application data of makers of cameras and drones, and then also what follows the image.

    A file without such data is returned as it is. Hardware decoders refuse files for it (MrNeRF/LichtFeld-Studio#1120);
    among it are whole further images. Raises ImageError for a broken header.
    """
    parts, begin = list[bytes](), 0
    for marker, place, length in _segments(data, is_strict=True):
        if 0xE0 <= marker <= 0xEF and not data.startswith(COMMON_DATA.get(marker, ()), place + 4):
            parts.append(data[begin:place])
            begin = place + 2 + length
        if marker == SOS:
            if not parts:
                return data
            end = data.find(EOI, place + 2 + length)
            return b"".join([*parts, data[begin : end + len(EOI)]]) if end >= 0 else data
    return data


def _components(data: bytes) -> int:
    """Return the number of components in the frame header; 0 without one."""
    for marker, place, _ in _segments(data, is_strict=False):
        if 0xC0 <= marker <= 0xCF and marker not in NOT_FRAMES and place + 9 < len(data):
            return data[place + 9]
    return 0


def _without_padding(scan: bytes) -> bytes:
    """Cut repeated 0 or 255 from the end of a scan; what a damaged scan leaves unread is not of one value."""
    bare = scan.rstrip(b"\xff").rstrip(b"\0").rstrip(b"\xff")
    return bare + b"\xff\0" * (scan[len(bare) : len(bare) + 2] == b"\xff\0")  # a stuffed byte is the scan's own


def decode(data: bytes, *, max_pixels: int, max_side: int) -> tuple[NDArray[np.uint8], str]:
    """Decode a JPEG to pixels [H, W, 3], not yet turned upright, and say what had to be repaired ("" for nothing).

    libjpeg's warnings are errors, unless repair() ends them: then every pixel is as stored. Chroma in a proportion that
    simplejpeg does not read is decoded by Pillow, which hides warnings, and counts as repaired. Where an image has more
    than `max_pixels`, its sides are divided by 2, 4 or 8 while it is decoded. Raises ImageError for damaged data.
    """
    try:
        header = read_header(data)
        return _decode_exactly(data, header, max_pixels=max_pixels, max_side=max_side)
    except TooLarge:
        raise
    except ImageError as error:
        for cut_padding in (False, True):
            repaired = repair(data, cut_padding=cut_padding)
            if repaired is not None:
                try:
                    header = read_header(repaired)
                    pixels, _ = _decode_exactly(repaired, header, max_pixels=max_pixels, max_side=max_side)
                except TooLarge:
                    raise
                except ImageError:
                    continue
                return pixels, str(error)
        raise


def _decode_exactly(data: bytes, header: Header, *, max_pixels: int, max_side: int) -> tuple[NDArray[np.uint8], str]:
    """Return pixels [H, W, 3], and how they were decoded if not as usual."""
    scale = _scale_of(header, size=len(data), max_pixels=max_pixels, max_side=max_side)
    if header.components != 4:
        return _strict(data, "RGB", header, scale)
    # libjpeg returns CMYK as stored; Adobe stores it inverted, so that 255 means no ink.
    inks, how = _strict(data, "CMYK", header, scale)
    light = (inks if header.is_adobe else 255 - inks).astype(np.uint32)
    return ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8), how


def _scale_of(header: Header, *, size: int, max_pixels: int, max_side: int) -> int:
    """Return the least division of the sides that decodes to max_pixels; raise TooLarge where there is none.

    A division that leaves less than max_side is refused, too: it would lose what was asked for.
    """
    pixels = header.width * header.height
    text = f"{header.width}x{header.height} pixels; at most {max_pixels} are decoded"
    if pixels <= max_pixels:
        return 1
    if pixels > size * PIXELS_PER_BYTE_MAX:
        raise TooLarge(f"decompression bomb: {text}, and {size} bytes cannot hold so many")
    if header.frame in PROGRESSIVE:
        raise TooLarge(f"progressive JPEG of {text}; give a larger --max-pixels")
    for scale in SCALES:
        if -(-pixels // scale**2) <= max_pixels and max(header.width, header.height) // scale >= max_side:
            return scale
    raise TooLarge(f"JPEG of {text}; give a larger --max-pixels or a smaller --max-side")


def _strict(data: bytes, colorspace: str, header: Header, scale: int) -> tuple[NDArray[np.uint8], str]:
    """Decode a JPEG; libjpeg's warnings (premature end, bad Huffman code) are errors here."""
    least = None if scale == 1 else (-(-header.height // scale), -(-header.width // scale))
    try:
        try:
            return jpeg.decode(data, colorspace, least=least), ""
        except jpeg.UnknownSubsampling:
            return jpeg.decode_by_pillow(data, colorspace, least=least), "chroma in a rare proportion"
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error


def check(data: bytes | memoryview, header: Header) -> None:
    """Raise ImageError unless the whole JPEG decodes to RGB, which the loaders need."""
    if header.components not in (1, 3):
        raise ImageError(f"the JPEG has {header.components} components; loaders decode gray and colour")
    try:
        jpeg.verify(data)
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error


def decode_what_is_there(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a damaged or cut JPEG to pixels [H, W, 3] as far as it goes, gray from there on; raise ImageError."""
    header = read_header(repair(data + EOI, cut_padding=False) or data)
    if header.width * header.height > max_pixels:
        raise TooLarge(f"{header.width}x{header.height} pixels; at most {max_pixels} are decoded of a damaged JPEG")
    try:
        return jpeg.decode(data, "RGB", is_strict=False)
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error
