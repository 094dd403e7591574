"""Philox4x32-10: random bits as a pure function of a counter and a key, the same on every machine.

Each round multiplies two of the four words to 64 bits, exchanges the halves and mixes in the key, which advances by a
Weyl sequence. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))  # Salmon et al., table 2
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, in 32 bits
LOW_32 = np.uint64(0xFFFFFFFF)
SHIFT_32 = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return four random words for each counter.

    counter: [..., 4] uint32; key: [2] uint32; result: [..., 4] uint32.
    """
    x0, x1, x2, x3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    key0, key1 = int(key[0]), int(key[1])
    for _ in range(ROUNDS):
        product0, product1 = MULTIPLIERS[0] * x0, MULTIPLIERS[1] * x2
        x0, x2 = (product1 >> SHIFT_32) ^ x1 ^ np.uint64(key0), (product0 >> SHIFT_32) ^ x3 ^ np.uint64(key1)
        x1, x3 = product1 & LOW_32, product0 & LOW_32
        key0, key1 = (key0 + WEYL[0]) & 0xFFFFFFFF, (key1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack((x0, x1, x2, x3), axis=-1).astype(np.uint32)


def key_of(seed: int) -> NDArray[np.uint32]:
    """Return the key of a seed in [0, 2**64), [2] uint32."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; give an integer from 0 to 2**64 - 1")
    return np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Map uint32 words to float32 in [0, 1), multiples of 2**-24: exact in float32, so 1 never occurs."""
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
