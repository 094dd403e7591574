"""Comparisons of a rival's results with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT32 = 1e-4  # sums over 10^6 elements in another order, divided by a std
HALF = 1e-2  # bfloat16 and float16: at most 2^-9 a rounding, a few in a row
HALF_MASKS = 0.1  # a ReLU after a rounded sum passes one gradient in a thousand wrongly: sqrt(2e-3) of the norm


class WrongResult(AssertionError):
    """The results differ too much from the reference; the message says by how much."""


def agree(results: Sequence[Tensor], expected: Sequence[Tensor], *, tolerance: float) -> None:
    """Raise WrongResult unless each |result - expected| is at most tolerance * |expected|, in float64 norms."""
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if result.shape != wanted.shape:
            raise WrongResult(f"result {index} has shape {tuple(result.shape)}, not {tuple(wanted.shape)}")
        difference = torch.linalg.vector_norm(result.float() - wanted.float(), dtype=torch.float64)
        error = (difference / torch.linalg.vector_norm(wanted.float(), dtype=torch.float64)).item()
        if not error <= tolerance:  # NaN fails too
            raise WrongResult(f"result {index} is off by {error:.1e} of its norm, more than {tolerance:.0e}")
