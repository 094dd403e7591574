"""Nearest neighbours and near copies among vectors by cosine, from blocks of their products: never N x N at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.embed import tables
from fastbyol.embed.vectors import Vectors
from fastbyol.errors import ConfigError
from fastbyol.system.progress import Progress
from fastbyol.system.threads import NO_TUNING, ThreadTuner

QUERIES = 2048  # vectors that are compared at a time,
BANK = 8192  # with as many
ROUNDING = 1e-6  # by which the cosine of two copies may fall below 1
PAIRS_MAX = 20_000_000
ROWS = 4096  # of a block that is written


class Nearest(NamedTuple):
    """The k nearest other rows of each row, nearest first: int64 [N, k], and their cosines, float32 [N, k]."""

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]

    def first(self, k: int) -> Nearest:
        """Return the k nearest alone."""
        return Nearest(self.rows[:, :k], self.cosines[:, :k])


class Pairs(NamedTuple):
    """Pairs of rows with a high cosine, the highest first: int64 [P, 2], the lower row first, and float32 [P]."""

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]


def unit_block(vectors: Vectors, first: int, end: int, device: str) -> Tensor:
    """Read the vectors from `first` up to `end` at unit length, float32 [n, F], on the device."""
    return F.normalize(torch.from_numpy(vectors.block(first, min(end, len(vectors)))).to(device).float(), dim=1)


@torch.inference_mode()
def compare(
    vectors: Vectors,
    *,
    k: int = 0,
    above: float | None = None,
    device: str = "cpu",
    threads: ThreadTuner = NO_TUNING,
) -> tuple[Nearest, Pairs]:
    """Find the k nearest neighbours of each vector, all others if there are fewer, and the pairs at or above a cosine.

    above: None for no pairs. Neighbours with the same cosine come by row. Raises ConfigError for more than PAIRS_MAX
    pairs.
    """
    count = len(vectors)
    k = min(k, count - 1)
    nearest = Nearest(np.empty((count, k), np.int64), np.empty((count, k), np.float32))
    pairs: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    pair_count = 0
    with Progress(total=count, desc="compare", unit="images") as bar:
        for query in range(0, count, QUERIES):
            queries = unit_block(vectors, query, query + QUERIES, device)
            best = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=device)
            begin = 0 if k else query // BANK * BANK  # pairs are found from their lower row
            for first in threads.units(range(begin, count, BANK), "compare"):
                cosines = (queries @ unit_block(vectors, first, first + BANK, device).T).clamp_(-1, 1)
                if above is not None:
                    pairs.append(_pairs_of(cosines, query, first, above=above))
                    pair_count += len(pairs[-1][0])
                    if pair_count > PAIRS_MAX:
                        raise ConfigError(
                            f"over {PAIRS_MAX} pairs have a cosine of {above:g} or more; give a higher --duplicates"
                        )
                if k:
                    best = _better(best, cosines, query, first, k=k)
            rows = slice(query, query + len(queries))
            nearest.cosines[rows], nearest.rows[rows] = (part.cpu().numpy() for part in best)
            bar.update(len(queries))
    return nearest, _join(pairs)


def _better(best: tuple[Tensor, Tensor], cosines: Tensor, query: int, first: int, *, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of those known, by cosine then row, and of a block, without each row itself."""
    queries, bank = cosines.shape
    own = torch.arange(query - first, query - first + queries, device=cosines.device)
    inside = (own >= 0) & (own < bank)
    cosines[inside.nonzero().squeeze(1), own[inside]] = -2.0
    values, rows = _largest(cosines, min(k, bank))
    values, rows = (torch.cat(pair, 1) for pair in zip(best, (values, rows + first), strict=True))
    by_row = rows.argsort(1)
    values, rows = values.gather(1, by_row), rows.gather(1, by_row)
    order = values.argsort(stable=True, dim=1, descending=True)[:, :k]
    return values.gather(1, order), rows.gather(1, order)


def _largest(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and their columns, of equal ones those of the lowest columns."""
    values, columns = cosines.topk(k)
    is_tied = (cosines >= values[:, -1:]).sum(1) > k  # topk may take any of them
    if is_tied.any():
        columns[is_tied] = cosines[is_tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        values = cosines.gather(1, columns)
    return values, columns


def _pairs_of(
    cosines: Tensor, query: int, first: int, *, above: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the pairs of a block whose lower row is the query, and their cosines."""
    places = (cosines >= above - ROUNDING).nonzero()
    places = places[places[:, 1] + first > places[:, 0] + query]
    found = places + torch.tensor([query, first], device=places.device)
    return found.cpu().numpy(), cosines[places[:, 0], places[:, 1]].cpu().numpy()


def _join(pairs: list[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> Pairs:
    rows = np.concatenate([np.empty((0, 2), np.int64), *(rows for rows, _ in pairs)])
    cosines = np.concatenate([np.empty(0, np.float32), *(values for _, values in pairs)])
    order = np.lexsort((rows[:, 1], rows[:, 0], -cosines))
    return Pairs(rows[order], cosines[order])


def write_nearest(path: Path, names: Sequence[str], nearest: Nearest) -> None:
    """Write a row for each neighbour of each image: name, rank from 1, neighbour, cosine."""
    k = nearest.rows.shape[1]

    def blocks() -> Iterator[Sequence[Sequence[Any]]]:
        for first in range(0, len(names), ROWS):
            rows, cosines = nearest.rows[first : first + ROWS], nearest.cosines[first : first + ROWS]
            asked = [name for name in names[first : first + ROWS] for _ in range(k)]
            yield asked, [*range(1, k + 1)] * len(rows), [names[row] for row in rows.ravel().tolist()], _short(cosines)

    tables.write(path, {"name": "text", "rank": "whole", "neighbour": "text", "cosine": "real"}, blocks())


def write_pairs(path: Path, names: Sequence[str], pairs: Pairs) -> None:
    """Write a row for each pair of images that are alike: name, copy, cosine."""

    def blocks() -> Iterator[Sequence[Sequence[Any]]]:
        for first in range(0, len(pairs.rows), ROWS):
            rows = pairs.rows[first : first + ROWS].tolist()
            yield [names[a] for a, _ in rows], [names[b] for _, b in rows], _short(pairs.cosines[first : first + ROWS])

    tables.write(path, {"name": "text", "copy": "text", "cosine": "real"}, blocks())


def _short(cosines: NDArray[np.float32]) -> list[float]:
    return [round(cosine, 6) for cosine in cosines.ravel().tolist()]
