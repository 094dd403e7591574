"""Which JPEGs a GPU's own decoder is given, and which of them it refused."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from ctypes import c_int, c_uint, c_void_p

from fastbyol.beton import Reader
from fastbyol.loaders.libnvjpeg import Library, NvJpegError

EOI = b"\xff\xd9"  # the end marker
SOF0, SOS, APP14 = 0xC0, 0xDA, 0xEE
NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # among C0 to CF

log = logging.getLogger(__name__)


class Headers:
    """What tells which JPEGs the hardware may be given, and those that it refused, each named in the log."""

    def __init__(self, library: Library, handle: c_void_p, resources: ExitStack) -> None:
        self._library, self._handle, self._stream = library, handle, c_void_p()
        library.nvjpegJpegStreamCreate(handle, self._stream)
        resources.callback(library.nvjpegJpegStreamDestroy, self._stream)
        self._width, self._height, self._is_refused = c_uint(), c_uint(), c_int()
        self._refused: dict[int, str] = {}
        self._reasons: set[str] = set()

    def fault(self, index: int, payload: memoryview, address: int, *, height: int, width: int) -> str:
        """Tell why the hardware does not decode a sample's bytes, which lie at `address`; "" if it should.

        nvJPEG's own reading of the size is what keeps it from writing over other images.
        """
        reason = self._refused.get(index) or fault_of_header(payload, height, width)
        if reason:
            return reason
        try:
            self._library.nvjpegJpegStreamParseHeader(self._handle, address, len(payload), self._stream)
            self._library.nvjpegJpegStreamGetFrameDimensions(self._stream, self._width, self._height)
            self._library.nvjpegDecodeBatchedSupported(self._handle, self._stream, self._is_refused)
        except NvJpegError as error:
            return str(error)
        if (self._height.value, self._width.value) != (height, width):
            return "another size than in its record"
        return "not supported by the hardware" if self._is_refused.value else ""

    def refuse(self, reader: Reader, index: int, reason: str) -> None:
        """Note, and log, that libjpeg decoded a sample: a warning for the first with this reason, else information."""
        if index in self._refused:
            return
        level = logging.INFO if reason in self._reasons else logging.WARNING
        self._reasons.add(reason)
        self._refused[index] = reason
        log.log(
            level,
            "%s: %s is decoded by libjpeg, in one thread, as is each that has this fault: %s; where they are many, "
            "give --loader native, or write the file anew with fastbyol-prep --mode jpeg",
            *(reader.path, reader.describe(index), reason),
        )


def fault_of_header(payload: memoryview, height: int, width: int) -> str:
    """Tell why a JPEG is none that every hardware decodes; "" for a whole baseline JPEG of YCbCr and this size."""
    if payload[-2:] != EOI:
        return "it does not end with an end marker"
    place, frame, is_rgb = 2, b"", False
    while place + 4 < len(payload) and payload[place] == 0xFF:
        marker, length = payload[place + 1], payload[place + 2] << 8 | payload[place + 3]
        if marker == SOS:
            return _fault_of_frame(frame, height, width, is_rgb=is_rgb, scanned=payload[place + 4])
        body = payload[place + 4 : place + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in NOT_FRAMES:
            if marker != SOF0:
                return "progressive, or otherwise not baseline"
            frame = bytes(body)
        elif marker == APP14 and bytes(body[:5]) == b"Adobe" and len(body) >= 12:
            is_rgb = body[11] == 0  # Adobe's transform: the components are not YCbCr
        place += 2 + length
    return "no baseline JPEG"


def _fault_of_frame(frame: bytes, height: int, width: int, *, is_rgb: bool, scanned: int) -> str:
    """Tell what is wrong with the frame header of a baseline JPEG (ITU T.81, B.2.2); "" for nothing."""
    if len(frame) < 15 or frame[0] != 8 or frame[5] != 3 or scanned != 3:
        return "not three components of 8 bits in one scan"
    if is_rgb or frame[6::3] == b"RGB":
        return "stored as RGB, not as YCbCr"
    if (frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]) != (height, width):
        return "another size than in its record"
    return ""
