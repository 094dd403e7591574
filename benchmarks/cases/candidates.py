"""Candidates for a faster step: today's form beside another that a switch turns on, as whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from benchmarks.cases import step
from benchmarks.harness import Case, Ready
from fastbyol.recipes import named

DEFAULT = 10  # algorithms that cuDNN tries for each convolution, as torch sets it
LIMITS = {f"{DEFAULT} (today)": DEFAULT, "0: every algorithm": 0}


def cases(device: str) -> Iterator[Case]:
    """Compare each candidate's forms; `bench.py candidates --only NAME` takes one."""
    recipe_name, batch_size = step.RECIPES[device][0]
    recipe = named(recipe_name)
    views = cache(partial(step._views, batch_size, recipe.crop_px, device))
    engine = "graph" if device == "cuda" else "eager"
    for name, limit in LIMITS.items():
        yield Case(
            "candidate: cudnn_benchmark_limit",
            f"{recipe_name}, batch {batch_size}",
            f"fastbyol, {engine}, {name}",
            partial(_limited, limit, partial(step._fastbyol, recipe, device, engine=engine), recipe, views, device),
            images=batch_size,
            dtype=step.PRECISION[device],
            is_alone=device == "cuda",
        )


def _limited(limit: int, make: Callable[[], step.Engine], *where: object) -> Ready:
    """Prepare a step whose convolutions were chosen among so many algorithms."""
    recipe, views, device = where
    torch.backends.cudnn.benchmark_limit = limit
    try:
        return step._prepare(make, recipe, views, device, is_checked=False)  # type: ignore[arg-type]
    finally:
        torch.backends.cudnn.benchmark_limit = DEFAULT  # for what is measured next
