"""The timed training steps: forward, backward, LARS and EMA on given views, by every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import plain
from benchmarks.cases.compare import WrongResult
from benchmarks.harness import Case, Ready
from fastbyol import optim
from fastbyol.config import Recipe
from fastbyol.model.byol import BYOL
from fastbyol.recipes import named
from fastbyol.train import step

RECIPES = {"cuda": (("imagenet_rn50", 512), ("cifar10_rn18", 512)), "cpu": (("cifar10_tiny", 64),)}
PRECISION = {"cuda": "bfloat16", "cpu": "float32"}
RATES = {"lr": 0.1, "tau": 0.99}
WARM_UP = step.WARM_UP + 2  # the engine's own, a capture, a replay
CHECK_IMAGES, CHECK_PX = 32, 64
CHECK_RTOL = 0.1  # losses of five steps in bfloat16, whose errors grow from step to step; garbage is further off

Engine = Callable[..., Any]  # views, lr, tau -> what has a loss


def _fastbyol(recipe: Recipe, device: str, *, engine: str, lagged_target: bool = False) -> Engine:
    model = _model(recipe, device)
    lars = optim.build(model, {} if lagged_target else model.target_of(), recipe.optim)
    return step.engine(engine, model, lars, precision=PRECISION[device], lagged_target=lagged_target)


def _plain(recipe: Recipe, device: str, *, is_compiled: bool = False) -> Engine:
    """Run plain torch code: batch norm, ReLU, sum and loss apart, foreach LARS; optionally all but LARS compiled."""
    model = _model(recipe, device)
    lars: Any = plain.LARS(model, recipe.optim, plain.lars_foreach_)
    made = step.Eager(model, lars, precision=step.PRECISIONS[PRECISION[device]])
    per_view = plain.PerView(model)
    made.forward = torch.compile(per_view, dynamic=False) if is_compiled else per_view
    return made


def _model(recipe: Recipe, device: str) -> BYOL:
    return BYOL(recipe.encoder, recipe.head, seed=0, target_statistics=recipe.target_statistics).to(device)


def _views(images: int, side: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    views = torch.randn(2 * images, 3, side, side, generator=generator, device=device)
    return views.to(step.PRECISIONS[PRECISION[device]], memory_format=torch.channels_last)


def _prepare(
    make: Callable[[], Engine],
    recipe: Recipe,
    views: Callable[[], Tensor],
    device: str,
    *,
    is_checked: bool,
) -> Ready:
    engine, given = make(), views()

    def run() -> object:
        return engine(given, **RATES)

    if is_checked:
        _check(make(), recipe, device)
    for _ in range(WARM_UP):
        run()
    return Ready(run)


def _check(engine: Engine, recipe: Recipe, device: str) -> None:
    """Compare the losses of a few steps on small views with those of plain code, from equal weights."""
    views = _views(CHECK_IMAGES, min(CHECK_PX, recipe.crop_px), device)
    other = _plain(recipe, device)
    losses = [[made(views, **RATES).loss.item() for _ in range(WARM_UP)] for made in (engine, other)]
    for ours, expected in zip(*losses, strict=True):
        if not abs(ours - expected) <= CHECK_RTOL * abs(expected):  # NaN fails too
            raise WrongResult(f"losses {losses[0]} stray from plain torch's {losses[1]}")


def cases(device: str) -> Iterator[Case]:
    """Compare the engines with plain code, one after the other where several models do not fit beside each other."""
    for name, batch_size in RECIPES[device]:
        yield from _comparison(name, batch_size, device)


def _comparison(name: str, batch_size: int, device: str) -> Iterator[Case]:
    recipe = named(name)
    views = cache(partial(_views, batch_size, recipe.crop_px, device))
    ours = {"fastbyol, graph": partial(_fastbyol, recipe, device, engine="graph")} if device == "cuda" else {}
    ours |= {"fastbyol, eager": partial(_fastbyol, recipe, device, engine="eager")}
    rivals = {"eager, a forward per view": partial(_plain, recipe, device)}
    if device == "cuda":
        lagged = "fastbyol, graph, lagged target"
        rivals |= {
            lagged: partial(_fastbyol, recipe, device, engine="graph", lagged_target=True),
            "compile, a forward per view": partial(_plain, recipe, device, is_compiled=True),
            "fastbyol, compile": partial(_fastbyol, recipe, device, engine="compile"),  # no kernel of ours but LARS
        }
    for implementation, make in (ours | rivals).items():
        yield Case(
            "step",
            f"{name}, batch {batch_size}",
            implementation,
            partial(
                _prepare, make, recipe, views, device, is_checked=implementation in ours or "lagged" in implementation
            ),
            images=batch_size,
            dtype=PRECISION[device],
            is_alone=device == "cuda",
        )
