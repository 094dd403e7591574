"""Know which sample stands where: global batch k is a pure function of (seed, k), whatever ran before or beside it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.philox import key_of, philox4x32

ORDER_STREAM = 0xFFFFFFFF  # fourth counter word; the views use small ones


class Rows(NamedTuple):
    """Name the samples of one batch: dataset indices and the epoch each belongs to, both int64 [B]."""

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]


@lru_cache(maxsize=2)
def permutation(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle 0..count-1 for one epoch by sorting 64 random bits a sample; read-only int64 [count]."""
    counter = np.zeros((count, 4), np.uint32)
    counter[:, 0] = np.arange(count, dtype=np.uint32)
    counter[:, 2] = epoch
    counter[:, 3] = ORDER_STREAM
    words = philox4x32(counter, key_of(seed))
    keys = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]
    shuffled = np.argsort(keys, kind="stable").astype(np.int64)
    shuffled.setflags(write=False)
    return shuffled


def global_batch(k: int, *, batch_size: int, count: int, seed: int) -> Rows:
    """Give batch k of the endless stream of epochs, each a permutation of all samples.

    Epochs follow one another without a gap, so a batch may end one epoch and begin the next, and every sample comes
    exactly once an epoch whatever the batch size.
    """
    positions = np.arange(k * batch_size, (k + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, count)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(count, seed=seed, epoch=int(epoch))[places[here]]
    return Rows(indices, epochs)


def stream(start: int, *, batch_size: int, count: int, seed: int) -> Iterator[Rows]:
    """Yield global batches start, start+1, ... without end."""
    k = start
    while True:
        yield global_batch(k, batch_size=batch_size, count=count, seed=seed)
        k += 1
