"""Copies among the images of a .beton: the same stored bytes, or nearly the same picture."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastbyol.beton import JPEG, Reader
from fastbyol.names import hash_content

BITS_APART = 3  # of 64, up to which two pictures are nearly the same
BANDS = 4  # of 16 bits: two hashes that are 3 bits apart agree in at least one of them


def exact(reader: Reader) -> list[list[int]]:
    """Group the samples whose stored images are the same, byte for byte: groups of two or more, by first sample."""
    numbers = tqdm(range(len(reader)), unit=" images", delay=2, disable=None)
    return _groups((hash_content(reader.payload(index)), index) for index in numbers)


def near(reader: Reader) -> list[list[int]]:
    """Group the samples whose pictures are nearly the same: those that chains of neighbours join, exact copies too.

    Neighbours are at most BITS_APART bits apart in the difference hash: of 9 x 8 mean gray levels, whether each is
    lighter than the one left of it. It knows a picture again that was scaled or encoded anew, not one that was cropped
    or mirrored.
    """
    numbers = tqdm(range(len(reader)), unit=" images", delay=2, disable=None)
    hashes = [difference_hash(reader, index) for index in numbers]
    parent = list(range(len(hashes)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    by_hash = defaultdict(list)
    for index, value in enumerate(hashes):
        by_hash[value].append(index)
    for alike in by_hash.values():
        for index in alike[1:]:
            parent[root(index)] = root(alike[0])
    for band in range(BANDS):
        buckets = defaultdict(list)
        for value in by_hash:
            buckets[value >> 16 * band & 0xFFFF].append(value)
        for values in buckets.values():
            for a, b in combinations(values, 2):
                if (a ^ b).bit_count() <= BITS_APART:
                    parent[root(by_hash[b][0])] = root(by_hash[a][0])
    return _groups((root(index), index) for index in range(len(hashes)))


def difference_hash(reader: Reader, index: int) -> int:
    """Compute the 64-bit difference hash of a sample's picture."""
    from PIL import Image  # noqa: PLC0415 - so that fastbyol-prep can report in one line that Pillow is missing
    from PIL.JpegImagePlugin import JpegImageFile  # noqa: PLC0415 - as above

    image: Image.Image
    if reader.modes[index] == JPEG:
        image = JpegImageFile(io.BytesIO(reader.payload(index)))  # not Image.open, which has a limit of its own
        image.draft("L", (36, 32))
    else:
        size = (int(reader.widths[index]), int(reader.heights[index]))
        image = Image.frombytes("RGB", size, bytes(reader.payload(index)))
    levels: NDArray[np.int16] = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = levels[:, 1:] > levels[:, :-1]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _groups(pairs: Iterable[tuple[Hashable, int]]) -> list[list[int]]:
    """Group numbers by key; return the groups of two or more."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for key, index in pairs:
        found[key].append(index)
    return [group for group in found.values() if len(group) > 1]


def name_groups(reader: Reader, groups: list[list[int]]) -> list[list[str]]:
    """Name the samples of groups: by their names, or by their numbers where the file has none."""
    names = reader.names()
    return [[str(index) if names is None else names[index] for index in group] for group in groups]


def format_groups(reader: Reader, groups: list[list[str]]) -> Iterator[str]:
    """Format named groups of copies: how many there are, then a line for each group."""
    more = sum(map(len, groups)) - len(groups)
    yield f"{more} of {len(reader)} images are copies, of {len(groups)} others"
    yield from (f"  {', '.join(group)}" for group in groups)
