"""Laws of fastbyol.philox."""

from __future__ import annotations

import numpy as np
import pytest

from fastbyol import philox
from tests.support.tolerances import KOLMOGOROV_SMIRNOV

# Random123's kat_vectors, philox4x32 10 rounds: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def test_known_answers(counter: list[int], key: list[int], result: list[int]) -> None:
    words = philox.philox4x32(np.array(counter, dtype=np.uint32), np.array(key, dtype=np.uint32))
    assert words.dtype == np.uint32
    assert words.tolist() == result


def test_a_batch_of_counters_equals_them_one_by_one() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (3, 5, 4), dtype=np.uint32)
    key = philox.key_of(2**40 + 7)
    batch = philox.philox4x32(counters, key)
    assert batch.shape == (3, 5, 4)
    for place in np.ndindex(3, 5):
        assert (batch[place] == philox.philox4x32(counters[place], key)).all()


def test_key_splits_the_seed_into_halves() -> None:
    assert philox.key_of(0x0123456789ABCDEF).tolist() == [0x89ABCDEF, 0x01234567]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        philox.key_of(seed)


def test_uniform_covers_its_half_open_interval_exactly() -> None:
    u = philox.uniform(np.array([0, 0xFF, 0x100, 0x80000000, 0xFFFFFFFF], dtype=np.uint32))
    assert u.dtype == np.float32
    assert u.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]


def test_consecutive_counters_are_uniform_and_uncorrelated() -> None:
    n = 20_000
    counters = np.zeros((n, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(n)
    u = philox.uniform(philox.philox4x32(counters, philox.key_of(1))).astype(np.float64)
    for word in np.sort(u, axis=0).T:
        assert np.abs(word - (np.arange(n) + 0.5) / n).max() < KOLMOGOROV_SMIRNOV / np.sqrt(n)
    correlation = np.corrcoef(np.concatenate([u[:-1], u[1:]], axis=1).T) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)
