"""Digests by which work that goes on later knows its images, wherever their file lies."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from fastbyol.beton import Reader
from fastbyol.names import hash_content

SAMPLES = 64


class Identity(NamedTuple):
    """Digests of a file's labels and sizes of images, and of SAMPLES of its images."""

    arrays: str
    samples: list[str]

    def is_of(self, other: Identity) -> bool:
        """Return whether both are of the same images; a few that have gone bad on the disk make no others of them."""
        same = sum(mine == others for mine, others in zip(self.samples, other.samples, strict=False))
        return self.arrays == other.arrays and 2 * same >= len(self.samples)


def identify(reader: Reader) -> Identity:
    """Compute the identity of the images of an open .beton."""
    arrays = hashlib.blake2b(digest_size=16)
    for array in (reader.widths, reader.heights, reader.sizes, reader.modes, reader.labels):
        arrays.update(b"" if array is None else array.tobytes())
    chosen = np.linspace(0, len(reader) - 1, min(SAMPLES, len(reader))).astype(int).tolist()
    return Identity(arrays.hexdigest(), [hash_content(reader.payload(index)) for index in chosen])
