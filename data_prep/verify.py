"""Verification of a .beton: structure, checksums of its sidecar, and decoding of every image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastbyol.beton import BetonError, Reader
from fastbyol.data_prep.formats import ImageError
from fastbyol.data_prep.images import check_stored
from fastbyol.data_prep.parallel import map_ordered
from fastbyol.data_prep.writer import BlockChecksums


def verify(reader: Reader, *, workers: int) -> Iterator[str]:
    """Yield one line per fault of the file: an image that does not decode, or a block with another checksum."""

    def fault(index: int) -> str | None:
        mode, width, height = (int(column[index]) for column in (reader.modes, reader.widths, reader.heights))
        try:
            check_stored(reader.payload(index), mode=mode, width=width, height=height)
        except ImageError as error:
            return f"{reader.describe(index)}: {error}"
        return None

    with closing(map_ordered(fault, range(len(reader)), workers=workers, total=len(reader))) as faults:
        yield from (line for line in faults if line is not None)
    yield from _damaged_blocks(reader)


def has_checksum(reader: Reader) -> bool:
    """Return whether the sidecar has checksums, which also detect bit flips that still decode."""
    return "checksum" in reader.sidecar


def _damaged_blocks(reader: Reader) -> Iterator[str]:
    """Yield one line per block of the file whose CRC-32 differs from the sidecar's."""
    if not has_checksum(reader):
        return
    checksum = reader.sidecar["checksum"]
    expected, block_bytes = checksum.get("crc32"), checksum.get("block_bytes")
    if not isinstance(expected, list) or block_bytes != reader.page_bytes:
        raise BetonError(
            f"{reader.path}.json: checksum is damaged; wanted block_bytes and crc32; write the .beton again"
        )
    found = _block_checksums(reader.path, block_bytes)
    if len(found) != len(expected):
        yield f"the file has {len(found)} blocks, its sidecar {len(expected)}"
    for block, (came, wanted) in enumerate(zip(found, expected, strict=False)):
        if came != wanted:
            first, end = block * block_bytes, (block + 1) * block_bytes
            inside = np.flatnonzero((reader.offsets >= first) & (reader.offsets < end))
            samples = f"samples {inside.min()} to {inside.max()}" if inside.size else "no image in it"
            yield f"bytes {first} to {end - 1} differ from the sidecar's checksum: {samples}"


def _block_checksums(path: Path, block_bytes: int) -> list[int]:
    """Return the CRC-32 of each block of a file."""
    sums = BlockChecksums(block_bytes)
    size = path.stat().st_size
    with (
        path.open("rb") as stream,
        tqdm(desc="checksums", total=size, unit="B", unit_scale=True, delay=2, disable=None) as bar,
    ):
        while chunk := stream.read(1 << 20):
            sums.update(chunk)
            bar.update(len(chunk))
    return sums.blocks()
