"""The size of a JPEG XL image, read from its first bytes: its decoder tells it only with all pixels decoded."""

from __future__ import annotations

from collections.abc import Iterator

CODESTREAM, BOXES = b"\xff\x0a", b"\0\0\0\x0cJXL "
LONG_SIZE, HEADER = 16, 8  # bytes of a box's header, with a size of 64 bits and without
PART_NUMBER = 4  # bytes before the codestream in a box of a part of it
SIDE_BITS = (9, 13, 18, 30)
LONGEST = 11  # bytes of the codestream that may hold the size: a mark, and twice 32 bits with 4 more
RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height, of codes 1 to 7


def read_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height as stored, before any orientation; None where the bytes do not hold them.

    Source: ISO/IEC 18181-1, SizeHeader, and 18181-2, boxes.
    """
    stream = data[:LONGEST] if data.startswith(CODESTREAM) else b""
    for part in _codestreams(data):
        stream += part[:LONGEST]
        if len(stream) >= LONGEST:
            break
    if not stream.startswith(CODESTREAM):
        return None
    bits = _Bits(stream[len(CODESTREAM) :])
    try:
        is_small = bits.take(1)
        height = _side(bits, is_small=bool(is_small))
        ratio = bits.take(3)
        if not ratio:
            return _side(bits, is_small=bool(is_small)), height
    except EOFError:
        return None
    wide, high = RATIOS[ratio - 1]
    return height * wide // high, height


class _Bits:
    """Numbers of bits, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._rest, self._count = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        """Return the next number; raise EOFError where the bytes end before it."""
        if count > self._count:
            raise EOFError
        number = self._rest & ((1 << count) - 1)
        self._rest >>= count
        self._count -= count
        return number


def _side(bits: _Bits, *, is_small: bool) -> int:
    """Return a side: a multiple of 8 up to 256, or any number of as many bits as a code of two bits says."""
    return 8 * (1 + bits.take(5)) if is_small else 1 + bits.take(SIDE_BITS[bits.take(2)])


def _codestreams(data: bytes) -> Iterator[bytes]:
    """Yield what the boxes of a file hold of its codestream."""
    at = 0
    while data.startswith(BOXES) and at + HEADER <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + HEADER]
        begin = at + HEADER
        if size == 1:
            size, begin = int.from_bytes(data[begin : begin + 8], "big"), at + LONG_SIZE
        end = at + size if size else len(data)
        if end < begin:
            return
        if kind in (b"jxlc", b"jxlp"):
            yield data[begin + PART_NUMBER * (kind == b"jxlp") : end]
        at = end
