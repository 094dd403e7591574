"""Sample order: global batch k is a pure function of (seed, k), and a rank's rows are a slice of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import ConfigError
from fastbyol.philox import key_of, philox4x32

ORDER_STREAM = 0xFFFFFFFF  # fourth word of the Philox counter; views use small values there


class Rows(NamedTuple):
    """The samples of one batch: dataset indices and the epoch of each, both int64 [B]."""

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]


@lru_cache(maxsize=2)
def permutation(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle 0..count-1 for one epoch by sorting 64 random bits per sample; return it read-only, int64 [count]."""
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
    """Return batch k of the endless stream of epochs, each a permutation of all samples.

    Epochs follow each other without a gap: a batch may contain the end of one epoch and the start of the next, and
    every sample occurs exactly once per epoch for any batch size.
    """
    positions = np.arange(k * batch_size, (k + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, count)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = permutation(count, seed=seed, epoch=int(epoch))[places[in_epoch]]
    return Rows(indices, epochs)


def rows_of_rank(rows: Rows, *, rank: int, ranks: int) -> Rows:
    """Return the rows of one rank: the rank-th of `ranks` equal slices of a global batch.

    Concatenated in rank order the slices are the batch, so that global batches do not depend on the number of ranks.
    Raises ConfigError if the batch does not divide evenly.
    """
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank is {rank} of {ranks}; wanted 0 to {ranks - 1}")
    local, rest = divmod(len(rows.indices), ranks)
    if rest or not local:
        nearest = " or ".join(str(n * ranks) for n in (local, local + 1) if n)
        raise ConfigError(
            f"a global batch of {len(rows.indices)} does not divide by {ranks} ranks; give --batch-size {nearest}"
        )
    mine = slice(rank * local, (rank + 1) * local)
    return Rows(rows.indices[mine], rows.epochs[mine])


def stream(start: int, *, batch_size: int, count: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Rows]:
    """Yield a rank's rows of global batches start, start+1, ... without end; earlier batches are not computed.

    batch_size: images of a global batch, over all ranks.
    """
    k = start
    while True:
        yield rows_of_rank(global_batch(k, batch_size=batch_size, count=count, seed=seed), rank=rank, ranks=ranks)
        k += 1
