"""Know the schedules: pure functions from progress in [0, 1] to a learning rate or a target rate."""

from __future__ import annotations

import math


def _falling_cosine(progress: float) -> float:
    return (math.cos(math.pi * progress) + 1) / 2


def learning_rate(progress: float, *, peak: float, warmup: float) -> float:
    """Rise linearly from 0 to `peak` over the share `warmup` of the run, then fall on a cosine to exactly 0."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * _falling_cosine((progress - warmup) / (1 - warmup))


def ema_rate(progress: float, *, base: float, rises: bool = True) -> float:
    """Raise tau from `base` to exactly 1: 1 - (1 - base)(cos(pi * progress) + 1) / 2; or keep it at `base`.

    Source: paper, section 3.2; table 5a, whose tau of 0 is kept.
    """
    if not rises:
        return base
    return 1 - (1 - base) * _falling_cosine(progress)
