"""Candidates for a faster step: today's form beside another that a switch turns on, as whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.cases import step
from benchmarks.cases.compare import WrongResult
from benchmarks.harness import Case, Ready
from fastbyol.batchnorm import join_convolutions_
from fastbyol.kernels import batchnorm_statistics
from fastbyol.recipes import named
from fastbyol.train.shadows import ShadowedForward

DEFAULT = 10  # algorithms that cuDNN tries for each convolution, as torch sets it
LIMITS = {f"{DEFAULT} (today)": DEFAULT, "0: every algorithm": 0}
LOSS_RTOL = 1e-2  # of two forwards by the same weights, for which cuDNN may choose different algorithms

Views = Callable[[], Tensor]


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
        ("weights in bfloat16", name): partial(_rounded, partial(today, precision="bfloat16"), views, copies)
        for name, copies in (("cast in the step (today)", False), ("copies by LARS", True))
    }
    forms |= {
        ("serpentine", name): partial(_walking, from_tail, today, recipe, views, device)
        for name, from_tail in (("sums from the first row (today)", False), ("sums from the last row", True))
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
            dtype="bfloat16" if candidate == "weights in bfloat16" else step.PRECISION[device],
            is_alone=device == "cuda",
        )


def _rounded(make: Callable[[], step.Engine], views: Views, copies: bool) -> Ready:
    """Prepare a step in bfloat16 whose weights are cast, or are copies that LARS writes, which are compared first."""
    made = make()
    if copies:
        made.forward = ShadowedForward(made.model, made.optimizer)

    def run() -> object:
        return made(views(), **step.RATES)

    for _ in range(step.WARM_UP):
        run()
    if copies:
        _check_copies(made, views()[: 2 * step.CHECK_IMAGES])
    return Ready(run)


def _check_copies(made: step.Engine, views: Tensor) -> None:
    """Raise WrongResult unless the copies are the rounded weights, and give the loss that cast weights give."""
    if not all(torch.equal(copied, x.bfloat16()) for x, copied in made.forward.shadows.of.items()):
        raise WrongResult("the copies that LARS wrote are not its weights, rounded")
    with torch.no_grad(), made.autocast():
        ours, expected = (forward(views).loss.item() for forward in (made.forward, made.model))
    if not abs(ours - expected) <= LOSS_RTOL * abs(expected):  # NaN fails too
        raise WrongResult(f"a loss of {ours} by copies of weights, of {expected} by autocast's casts")


def _joining(today: Callable[[], step.Engine], joins: bool) -> step.Engine:
    """Build a step whose 1x1 convolutions compute the statistics after them, or today's."""
    made = today()
    join_convolutions_(made.model, joins)
    return made


def _walking(from_tail: bool, make: Callable[[], step.Engine], *where: object) -> Ready:
    """Prepare a step whose batch norms sum in this order, as its graph then does; without a graph all sum as today."""
    recipe, views, device = where
    batchnorm_statistics.FROM_TAIL = from_tail
    try:
        return step._prepare(make, recipe, views, device, is_checked=False)  # type: ignore[arg-type]
    finally:
        batchnorm_statistics.FROM_TAIL = False  # for what is measured next


def _limited(limit: int, make: Callable[[], step.Engine], *where: object) -> Ready:
    """Prepare a step whose convolutions were chosen among so many algorithms."""
    recipe, views, device = where
    torch.backends.cudnn.benchmark_limit = limit
    try:
        return step._prepare(make, recipe, views, device, is_checked=False)  # type: ignore[arg-type]
    finally:
        torch.backends.cudnn.benchmark_limit = DEFAULT  # for what is measured next
