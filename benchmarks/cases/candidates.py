"""Candidates for a faster step: today's form beside another that a switch turns on, as whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from benchmarks.cases import step
from benchmarks.harness import Case, Ready
from fastbyol.recipes import named


def cases(device: str) -> Iterator[Case]:
    """Compare each candidate's forms; `bench.py candidates --only NAME` takes one."""
    recipe_name, batch_size = step.RECIPES[device][0]
    recipe = named(recipe_name)
    views = cache(partial(step._views, batch_size, recipe.crop_px, device))
    engine = "graph" if device == "cuda" else "eager"
    for candidate, forms in CANDIDATES.items():
        for name, change in forms.items():
            yield Case(
                f"candidate: {candidate}",
                f"{recipe_name}, batch {batch_size}",
                f"fastbyol, {engine}, {name}",
                partial(
                    _changed, change, partial(step._fastbyol, recipe, device, engine=engine), recipe, views, device
                ),
                images=batch_size,
                dtype=step.PRECISION[device],
                is_alone=device == "cuda",
            )


SEARCHED = 10  # algorithms that cuDNN tries for each convolution, by torch's default


def _search(limit: int, _made: step.Engine) -> None:
    """Let cuDNN try so many algorithms for each convolution; 0: all."""
    torch.backends.cudnn.benchmark_limit = limit


CANDIDATES: dict[str, dict[str, Callable[[step.Engine], None]]] = {
    "cudnn_benchmark_limit": {"10 (today)": partial(_search, SEARCHED), "0: every algorithm": partial(_search, 0)},
}


def _changed(change: Callable[[step.Engine], None], make: Callable[[], step.Engine], *where: object) -> Ready:
    """Prepare a step with a change."""
    recipe, views, device = where

    def made() -> step.Engine:
        engine = make()
        change(engine)
        return engine

    try:
        return step._prepare(made, recipe, views, device, is_checked=False)  # type: ignore[arg-type]
    finally:
        torch.backends.cudnn.benchmark_limit = (
            SEARCHED  # algorithms are chosen: what is measured next finds the default
        )
