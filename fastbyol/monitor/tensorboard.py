"""TensorBoard event files: scalars as protobuf messages in TFRecord frames, written without its package.

A frame is the message's length (uint64), the length's checksum, the message and its checksum. Checksums are CRC-32C,
rotated and offset by a constant, so that a frame inside a frame is not valid by chance. Sources: TensorFlow's
"TFRecords format details"; fields 1, 2, 3, 5, 7 of tensorflow/core/util/event.proto, 1 and 2 of Summary.Value, 1 of
SessionLog; protobuf's wire format. torch.utils.tensorboard would cost 0.2 s at the start of every run, a thread and
seven packages; docs/log.md compares it and tensorboardX.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastbyol.storage.files import RecordFile

# TensorBoard's groups; all other numbers are of group "machine".
GROUPS = {
    "scores": ("knn_top1", "probe_top1", "probe_loss", "rankme", "effective_rank", "alignment", "uniformity"),
    "learning": ("loss", "lr", "tau", "embedding_std", "crop_px"),
}
POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
MASK = 0xA282EAD8
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
SESSION_START = 1


def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
        entries.append(crc)
    return tuple(entries)


TABLE = _table()


def crc32c(data: bytes) -> int:
    """Compute the CRC-32C of the bytes. Source: RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def frame(message: bytes) -> bytes:
    """Wrap a message as one TFRecord."""

    def checksum(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(message))
    return length + checksum(length) + message + checksum(message)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def _field(number: int, wire: int, payload: bytes) -> bytes:
    length = _varint(len(payload)) if wire == BYTES else b""
    return _varint(number << 3 | wire) + length + payload


def _event(step: int, *parts: bytes) -> bytes:
    return frame(
        b"".join((_field(1, FIXED64, struct.pack("<d", time.time())), _field(2, VARINT, _varint(step)), *parts))
    )


def _scalar(tag: str, value: float) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # beyond float32, as the loss of a diverging run may be
        packed = struct.pack("<f", math.copysign(math.inf, value))
    return _field(1, BYTES, _field(1, BYTES, tag.encode()) + _field(2, FIXED32, packed))


class EventFile:
    """A new event file of scalars in `folder`, which is created if missing; raises OSError.

    It makes TensorBoard discard what earlier files of the folder hold of steps from `first_step` on.
    """

    def __init__(self, folder: Path, *, first_step: int, warn: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns() // 1_000_000:014d}.{os.getpid()}"
        self._file = RecordFile(path, warn=warn)
        version = _field(3, BYTES, b"brain.Event:2")
        session = _field(7, BYTES, _field(1, VARINT, _varint(SESSION_START)))
        self._file.append(_event(0, version) + _event(first_step, session))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one event: the scalars of a step, by tag."""
        values = b"".join(_scalar(tag, value) for tag, value in scalars.items())
        self._file.append(_event(step, _field(5, BYTES, values)))

    def close(self) -> None:
        """Write the events that a full disk held back, and close."""
        self._file.close()


class TensorBoardSink:
    """A sink that writes the numbers of every row to a new event file; the arguments are EventFile's."""

    def __init__(self, folder: Path, *, first_step: int, warn: Callable[[str], None]) -> None:
        self._events = EventFile(folder, first_step=first_step, warn=warn)

    def write(self, row: dict[str, Any]) -> None:
        """Write the numbers of one row."""
        self._events.write(row["step"], scalars(row))

    def close(self) -> None:
        """Write the events that a full disk held back, and close."""
        self._events.close()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by their TensorBoard tags: scores/knn_top1, learning/loss, machine/images_per_s."""
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    return {
        f"{group_of.get(name, 'machine')}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
