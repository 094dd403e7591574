"""Laws of the sample order: a pure function of (seed, k), every sample once an epoch."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from fastbyol.errors import ConfigError
from fastbyol.order import global_batch, permutation, rows_of_rank, stream

PINNED = [6, 1, 2, 4, 5, 0, 3, 7]  # a change here changes every run: resuming older ones would no longer be exact


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (10, 3), (10, 10), (7, 2), (1000, 64)])
def test_every_sample_comes_exactly_once_an_epoch(count: int, batch_size: int) -> None:
    epochs = 3
    batches = list(islice(stream(0, batch_size=batch_size, count=count, seed=5), -(-epochs * count // batch_size)))
    indices = np.concatenate([rows.indices for rows in batches])
    labels = np.concatenate([rows.epochs for rows in batches])
    for epoch in range(epochs):
        here = indices[epoch * count : (epoch + 1) * count]
        assert sorted(here) == list(range(count))
        assert (labels[epoch * count : (epoch + 1) * count] == epoch).all()


def test_stream_starts_anywhere_without_its_past() -> None:
    late = next(stream(17, batch_size=6, count=40, seed=2))
    walked = list(islice(stream(0, batch_size=6, count=40, seed=2), 18))[17]
    assert np.array_equal(late.indices, walked.indices)
    assert np.array_equal(late.epochs, walked.epochs)


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [permutation(500, seed=seed, epoch=epoch) for seed in (0, 1, 2**40) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_positions_are_uniform() -> None:
    places = np.stack([np.argsort(permutation(20, seed=0, epoch=epoch)) for epoch in range(2000)])
    counts = np.stack([(places == place).sum(0) for place in range(20)])
    assert np.abs(counts - 100).max() < 50  # 5 standard deviations of a binomial(2000, 1/20)


def test_order_is_pinned() -> None:
    assert permutation(8, seed=0, epoch=0).tolist() == PINNED
    assert global_batch(1, batch_size=3, count=8, seed=0).indices.tolist() == PINNED[3:6]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_take_equal_slices_of_the_same_global_batch(ranks: int) -> None:
    for k in (0, 5):
        whole = global_batch(k, batch_size=24, count=41, seed=3)
        streams = [stream(k, batch_size=24, count=41, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
        parts = [next(each) for each in streams]
        assert {len(part.indices) for part in parts} == {24 // ranks}
        assert np.array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
        assert np.array_equal(np.concatenate([part.epochs for part in parts]), whole.epochs)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "advice"), [(24, 7, "21 or 28"), (3, 8, "give --batch-size 8"), (9, 8, "8 or 16")]
)
def test_a_batch_that_ranks_cannot_share_is_refused(batch_size: int, ranks: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        rows_of_rank(global_batch(0, batch_size=batch_size, count=41, seed=0), rank=0, ranks=ranks)


def test_a_rank_outside_its_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank is 2 of 2"):
        rows_of_rank(global_batch(0, batch_size=4, count=41, seed=0), rank=2, ranks=2)
