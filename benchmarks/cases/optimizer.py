"""The timed optimisers: LARS and the EMA of the target over all tensors of a BYOL model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import plain
from benchmarks.cases.compare import agree
from benchmarks.harness import Absent, Case, Ready
from fastbyol import optim
from fastbyol.config import OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.kernels import reference
from fastbyol.model.byol import BYOL
from fastbyol.optim import larc
from fastbyol.recipes import named

RECIPES = {"cuda": ("imagenet_rn50", "cifar10_rn18"), "cpu": ("cifar10_tiny",)}
RATES = {"lr": 0.2, "tau": 0.99}
DISPLACEMENT = 1e-3  # of parameters about a thousand times larger, in float32


class Problem(NamedTuple):
    """A model whose parameters have gradients, and its optimiser's constants."""

    model: BYOL
    config: OptimConfig


def _problem(recipe_name: str, device: str) -> Problem:
    recipe = named(recipe_name)
    model = BYOL(recipe.encoder, recipe.head, seed=0).to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.empty_like(parameter).normal_(0, 1e-2, generator=generator)
        for target in model.target.parameters():
            target.mul_(0.5)  # so that an EMA has something to do
    return Problem(model, recipe.optim)


def _lars(make: Callable[[Problem], Any], problem: Callable[[], Problem]) -> Ready:
    """Prepare an optimiser of this formula over a copy of the model."""
    own = _copied(problem())
    optimizer = make(own)
    optimizer.set_rates(**RATES)
    return Ready(optimizer.step, lambda: _check(optimizer, own.model, problem()))


def _copied(problem: Problem, dtype: torch.dtype = torch.float32) -> Problem:
    """Copy the model and its gradients."""
    model = copy.deepcopy(problem.model).to(dtype)
    for copied, parameter in zip(model.parameters(), problem.model.parameters(), strict=True):
        copied.grad = None if parameter.grad is None else parameter.grad.to(dtype, copy=True)
    return problem._replace(model=model)


def _fastbyol(problem: Problem) -> optim.LARS:
    return optim.build(problem.model, problem.model.target_of(), problem.config)


def _plain(step: Callable[..., None], problem: Problem) -> plain.LARS:
    return plain.LARS(problem.model, problem.config, step)


def _compiled(problem: Problem) -> plain.LARS:
    return _plain(torch.compile(plain.lars_foreach_, dynamic=False), problem)


def _check(optimizer: Any, model: BYOL, start: Problem) -> None:
    """Compare what one step moved, all parameters and targets as one vector, with the formula in float64."""
    exact = _copied(start, torch.float64)
    oracle = _plain(plain.lars_loop_, exact)
    oracle.set_rates(**RATES)
    for stepped in (oracle, optimizer):
        stepped.step()
    agree([_moved(model, start)], [_moved(exact.model, start)], tolerance=DISPLACEMENT)


def _moved(model: BYOL, start: Problem) -> Tensor:
    pairs = zip(model.parameters(), start.model.parameters(), strict=True)
    return torch.cat([(now.detach().double() - before.detach().double()).flatten() for now, before in pairs])


def _apex_larc(problem: Callable[[], Problem]) -> Ready:
    """Prepare apex's LARC, which is not LARS (see fastbyol.optim.larc): timed, not compared."""
    own = _copied(problem())
    with _absent():
        optimizer = larc.LARC(own.model, own.model.target_of(), own.config)
    optimizer.set_rates(**RATES)
    return Ready(optimizer.step)


def _sgd_and_ema(make: Callable[..., torch.optim.Optimizer], problem: Callable[[], Problem]) -> Ready:
    """Prepare a fused SGD and a foreach EMA: no norms, so fewer bytes; the floor of what two launches could do."""
    own = _copied(problem())
    optimizer = make([p for p in own.model.parameters() if p.requires_grad])
    pairs = own.model.target_of()

    def run() -> None:
        optimizer.step()
        with torch.no_grad():
            reference.ema_(list(pairs.values()), list(pairs), tau=RATES["tau"])

    return Ready(run)


def _fused_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=1e-6, fused=True)


def _apex_fused_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    with _absent():
        fused: Callable[..., torch.optim.Optimizer] = larc.import_piece("FusedSGD")
    return fused(params, lr=1e-3, momentum=0.9, weight_decay=1e-6)


@contextmanager
def _absent() -> Iterator[None]:
    """Raise Absent, with fastbyol's message, where a piece of apex is missing."""
    try:
        yield
    except ConfigError as error:
        raise Absent(str(error)) from error


def cases(device: str) -> Iterator[Case]:
    """Compare one step of LARS with its EMA, then of what resembles it."""
    for recipe in RECIPES[device]:
        problem = cache(partial(_problem, recipe, device))
        rivals: dict[str, Callable[[Callable[[], Problem]], Ready]] = {
            "fastbyol": partial(_lars, _fastbyol),
            "foreach": partial(_lars, partial(_plain, plain.lars_foreach_)),
            "eager": partial(_lars, partial(_plain, plain.lars_loop_)),
        }
        if device == "cuda":
            rivals |= {
                "torch fused SGD + foreach EMA (not LARS)": partial(_sgd_and_ema, _fused_sgd),
                "apex FusedSGD + foreach EMA (not LARS)": partial(_sgd_and_ema, _apex_fused_sgd),
                "apex LARC + foreach EMA (not LARS)": _apex_larc,
                "compile": partial(_lars, _compiled),
            }
        sizes = _sizes(recipe)
        for name, prepare in rivals.items():
            yield Case(
                "LARS + EMA",
                f"{recipe}, {sizes.parameters / 1e6:.1f} M parameters in {sizes.tensors}",
                name,
                partial(prepare, problem),
                bytes_moved=28 * sizes.parameters + 8 * sizes.followed,  # norms 8, sweep 20, target 8
                is_alone=name == "compile",
            )


class Sizes(NamedTuple):
    """Count parameters that are trained, their tensors, and those that a target follows."""

    parameters: int
    tensors: int
    followed: int


@cache
def _sizes(recipe_name: str) -> Sizes:
    recipe = named(recipe_name)
    with torch.device("meta"):
        model = BYOL(recipe.encoder, recipe.head, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Sizes(sum(p.numel() for p in trained), len(trained), sum(p.numel() for p in model.target_of()))
