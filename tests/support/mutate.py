"""Damage to a .beton as copies, disks, interrupted writes and attackers do it, and its repair."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastbyol.beton import ALLOCATION, DESCRIPTOR, HEADER, Reader, record_dtype

# Values at which counts, sizes and pointers go wrong.
EDGES = [0, 1, 2, 23, 24, *((1 << bits) + step for bits in (7, 8, 15, 16, 21, 31, 32, 62, 63, 64) for step in (-1, 0))]
PAGE = 1 << 21
MARKERS = (0xC0, 0xC1, 0xC2, 0xC4, 0xC9, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE, 0xFF, 0x00)
MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
BLOCK = 64
VALUE = re.compile(rb'"[^"]*"|-?\d+|\[|\{|null')
FOREIGN = (b"null", b"-1", b"1e999", b"[]", b"{}", b'"\\u001b[2J\\n"', b"9" * 30, b"[" * 5000, b"NaN", b"true", b"\xff")

Patch = tuple[int, bytes]  # where, what
Region = tuple[int, int]  # first byte, end


class Anatomy:
    """Places of the parts of one sound .beton: header, descriptors, records, images, table."""

    def __init__(self, path: Path) -> None:
        with Reader(path) as reader:
            starts, ends = reader.offsets.tolist(), (reader.offsets + reader.sizes).tolist()
            self.images: list[Region] = list(zip(starts, ends, strict=True))
            count, fields = len(reader), len(reader.field_names)
        self.size = path.stat().st_size
        self.table = self.size - count * ALLOCATION.itemsize
        self.records = HEADER.itemsize + fields * DESCRIPTOR.itemsize
        record = record_dtype([2, 1][:fields])
        self.numbers: list[tuple[int, int]] = []  # place and width of every integer the reader uses
        self._add(HEADER, 0, 1)
        self._add(DESCRIPTOR, HEADER.itemsize, fields)
        self._add(record, self.records, count)
        self._add(ALLOCATION, self.table, count)
        self.data = path.read_bytes()

    def _add(self, dtype: np.dtype, start: int, count: int) -> None:
        for name in dtype.names or ():
            field, offset = dtype.fields[name][:2]
            for number in range(count):
                place = start + number * dtype.itemsize + offset
                if field.names:
                    self._add(field, place, 1)
                elif field.shape == ():
                    self.numbers.append((place, field.itemsize))


def mutate(anatomy: Anatomy, rng: np.random.Generator) -> tuple[list[Patch], int]:
    """Return the patches of one mutant, and its size."""
    kinds: list[Callable[[Anatomy, np.random.Generator], list[Patch]]] = [_number, _swap, _flip, _marker, _block, _move]
    patches: list[Patch] = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        patches += kinds[rng.choice(len(kinds), p=[0.3, 0.1, 0.2, 0.2, 0.1, 0.1])](anatomy, rng)
    size = anatomy.size
    if rng.random() < 0.1:
        anywhere, head, table = (
            rng.integers(anatomy.size),
            rng.integers(4096),
            rng.integers(anatomy.table, anatomy.size),
        )
        longer = anatomy.size + rng.integers(1, 100), anatomy.size + 24
        size = int(rng.choice([anywhere, head, table, anatomy.size - 24, *longer]))
    return patches, size


def mutate_sidecar(text: bytes, rng: np.random.Generator) -> bytes:
    """Cut a JSON text, change bytes of it, or put one of its values in the place of another."""
    values = list(VALUE.finditer(text))
    old, new = (values[rng.integers(len(values))] for _ in range(2))
    place = int(rng.integers(len(text)))
    choices = [
        text[:place],
        text[:place] + rng.bytes(1) + text[place + 1 :],
        text[: old.start()] + new[0] + text[old.end() :],
        text[: old.start()] + FOREIGN[rng.integers(len(FOREIGN))] + text[old.end() :],
    ]
    return choices[rng.integers(len(choices))]


@contextmanager
def applied(stream: int, anatomy: Anatomy, patches: list[Patch], size: int) -> Iterator[None]:
    """Damage the open file, and put it right again."""
    for place, data in patches:
        os.pwrite(stream, data, place)
    os.ftruncate(stream, size)
    try:
        yield
    finally:
        os.ftruncate(stream, anatomy.size)
        # What a cut took away: the parts that are not zeros.
        cut = [(start, end) for start, end in ((0, 8192), *anatomy.images, (anatomy.table, anatomy.size)) if end > size]
        for start, end in (*((place, place + len(data)) for place, data in patches), *cut):
            os.pwrite(stream, anatomy.data[start:end], start)


def _number(anatomy: Anatomy, rng: np.random.Generator) -> list[Patch]:
    """Set a number to an edge, or near to what it was."""
    place, width = anatomy.numbers[rng.integers(len(anatomy.numbers))]
    was = int.from_bytes(anatomy.data[place : place + width], "little")
    near = [was + int(rng.integers(-3, 4)), was - PAGE, was + PAGE, 2 * was, was ^ 1 << int(rng.integers(8 * width))]
    value = EDGES[rng.integers(len(EDGES))] if rng.random() < 0.5 else near[rng.integers(len(near))]
    return [(place, (value % (1 << 8 * width)).to_bytes(width, "little"))]


def _swap(anatomy: Anatomy, rng: np.random.Generator) -> list[Patch]:
    """Put one number where another of its width stands."""
    place, width = anatomy.numbers[rng.integers(len(anatomy.numbers))]
    like = [start for start, length in anatomy.numbers if length == width]
    source = like[rng.integers(len(like))]
    return [(place, anatomy.data[source : source + width])]


def _flip(anatomy: Anatomy, rng: np.random.Generator) -> list[Patch]:
    """Flip a bit of the index or of an image."""
    start, end = _region(anatomy, rng)
    place = int(rng.integers(start, end))
    return [(place, bytes([anatomy.data[place] ^ (1 << int(rng.integers(8)))]))]


def _marker(anatomy: Anatomy, rng: np.random.Generator) -> list[Patch]:
    """Turn a JPEG marker into another, or change the bytes behind one: lengths, sizes, components, tables."""
    start, end = anatomy.images[rng.integers(len(anatomy.images))]
    marks = [start + match.start() for match in MARKER.finditer(anatomy.data[start:end])]
    place = marks[rng.integers(len(marks))] if marks else start
    if rng.random() < 0.3:
        return [(place + 1, bytes([int(rng.choice(MARKERS))]))]
    behind = place + 2 + int(rng.integers(min(20, end - place - 1)))
    return [(min(behind, end - 1), bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))]))]


def _block(anatomy: Anatomy, rng: np.random.Generator) -> list[Patch]:
    """Fill a stretch with zeros, ones or noise."""
    start, end = _region(anatomy, rng)
    place = int(rng.integers(start, end))
    length = min(int(rng.integers(1, BLOCK)), end - place)
    return [(place, [bytes(length), b"\xff" * length, rng.bytes(length)][rng.integers(3)])]


def _move(anatomy: Anatomy, rng: np.random.Generator) -> list[Patch]:
    """Repeat a stretch of the file elsewhere, as a misplaced block does."""
    start, end = _region(anatomy, rng)
    place, source = int(rng.integers(start, end)), int(rng.integers(*_region(anatomy, rng)))
    length = min(int(rng.integers(1, BLOCK)), end - place)
    return [(place, anatomy.data[source : source + length].ljust(length, b"\0"))]


def _region(anatomy: Anatomy, rng: np.random.Generator) -> Region:
    """Choose a part of the file: what is not zeros."""
    index = [(0, HEADER.itemsize), (HEADER.itemsize, anatomy.records), (anatomy.records, anatomy.records + 300)]
    regions = [*index, (anatomy.table, anatomy.size), *anatomy.images]
    weights = np.array([2, 1, 3, 3, *[6 / len(anatomy.images)] * len(anatomy.images)], float)
    return regions[rng.choice(len(regions), p=weights / weights.sum())]
