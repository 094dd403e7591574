"""Candidates for a faster step: today's form beside another that a switch turns on, as whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch

from benchmarks.cases import step
from benchmarks.harness import Case, Ready
from fastbyol.model.batchnorm import join_convolutions_
from fastbyol.recipes import named

DEFAULT = 10  # algorithms that cuDNN tries for each convolution, as torch sets it
LIMITS = {f"{DEFAULT} (today)": DEFAULT, "0: every algorithm": 0}


def cases(device: str) -> Iterator[Case]:
    """Compare each candidate's forms; `bench.py candidates --only NAME` takes one.

    What promises most comes first, and cuDNN's search among all algorithms, which takes longest, last.
    """
    recipe_name, batch_size = step.RECIPES[device][0]
    recipe = named(recipe_name)
    views = cache(partial(step._views, batch_size, recipe.crop_px, device))
    engine = "graph" if device == "cuda" else "eager"
    today = partial(step._fastbyol, recipe, device, engine=engine)
    forms = {
        ("target statistics", name): partial(
            step._prepare,
            partial(step._fastbyol, replace(recipe, target_statistics=statistics), device, engine=engine),
            recipe,
            views,
            device,
            is_checked=False,
        )
        for name, statistics in (("batch (today)", "batch"), ("running", "running"))
    }
    forms |= {
        ("statistics in 1x1 convolutions", name): partial(
            step._prepare, partial(_joining, today, joins), recipe, views, device, is_checked=joins
        )
        for name, joins in (("apart", False), ("joined (today)", True))
    }
    forms |= {
        ("cudnn_benchmark_limit", name): partial(_limited, limit, today, recipe, views, device)
        for name, limit in LIMITS.items()
    }
    for (candidate, name), prepare in forms.items():
        yield Case(
            f"candidate: {candidate}",
            f"{recipe_name}, batch {batch_size}",
            f"fastbyol, {engine}, {name}",
            prepare,
            images=batch_size,
            dtype=step.PRECISION[device],
            is_alone=device == "cuda",
        )


def _joining(today: Callable[[], step.Engine], joins: bool) -> step.Engine:
    """Build a step whose 1x1 convolutions compute the statistics after them, or today's."""
    made = today()
    join_convolutions_(made.model, joins)
    return made


def _limited(limit: int, make: Callable[[], step.Engine], *where: object) -> Ready:
    """Prepare a step whose convolutions were chosen among so many algorithms."""
    recipe, views, device = where
    torch.backends.cudnn.benchmark_limit = limit
    try:
        return step._prepare(make, recipe, views, device, is_checked=False)  # type: ignore[arg-type]
    finally:
        torch.backends.cudnn.benchmark_limit = DEFAULT  # for what is measured next
