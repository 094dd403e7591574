"""The stem's batch norm and max pooling that are timed: forward and backward for two consumers, against torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.cases.compare import FLOAT32, HALF, HALF_MASKS, agree
from benchmarks.harness import Case, Ready
from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm import batch_norm_act
from fastbyol.kernels.batchnorm_pool import batch_norm_relu_pool
from fastbyol.kernels.max_pool import max_pool
from fastbyol.kernels.reference import NormParams
from fastbyol.model.batchnorm import EPS, MOMENTUM

SHAPES = {"cuda": (1024, 64, 112), "cpu": (16, 8, 32)}  # two views of 512 images of 224 px
Pool = Callable[[Tensor], tuple[Tensor, Tensor]]
NormPool = Callable[[Tensor, NormParams], tuple[Tensor, Tensor]]


def cases(device: str) -> Iterator[Case]:
    """Compare pooling alone, then batch norm, ReLU and pooling; autograd adds the two gradients of torch's."""
    images, channels, side = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = cache(partial(_drawn, images, channels, side, device, dtype))
    elements = images * channels * side**2
    # x read, z written, a byte; two dz and the byte read, dx written; z is a quarter of x
    bytes_moved = round(elements * (dtype.itemsize * (1 + 1 / 4 + 2 / 4 + 1) + 2 / 4))
    for implementation, pool in {"fastbyol": max_pool, "eager": reference.max_pool}.items():
        yield Case(
            "stem max_pool and gradient",
            f"{images}x{channels}x{side}x{side}",
            implementation,
            partial(_prepare, pool, x),
            dtype=str(dtype).removeprefix("torch."),
            bytes_moved=bytes_moved,
        )
    # statistics: x; forward: x read, z and a byte written; backward, twice: x, two dz and the byte read; dx written
    bytes_moved = round(elements * (dtype.itemsize * (1 + 1 + 1 / 4 + 2 * (1 + 2 / 4) + 1) + 3 / 4))
    for implementation, pool in {"fastbyol": batch_norm_relu_pool, "fastbyol, apart": _apart, "eager": _eager}.items():
        yield Case(
            "stem batch norm, ReLU, max_pool and gradient",
            f"{images}x{channels}x{side}x{side}",
            implementation,
            partial(_prepare_norm, pool, x),
            dtype=str(dtype).removeprefix("torch."),
            bytes_moved=bytes_moved,
        )


def _norm(channels: int, device: torch.device) -> NormParams:
    """Make the parameters of a batch norm of two views."""
    weight, bias = torch.linspace(0.5, 1.5, channels, device=device), torch.linspace(-1.0, 1.0, channels, device=device)
    moved = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    leaves = weight.requires_grad_(), bias.requires_grad_()
    return NormParams(*leaves, *moved, None, views=2, momentum=MOMENTUM, eps=EPS)


def _apart(x: Tensor, norm: NormParams) -> tuple[Tensor, Tensor]:
    return max_pool(batch_norm_act(x, norm, relu=True))


def _eager(x: Tensor, norm: NormParams) -> tuple[Tensor, Tensor]:
    return reference.max_pool(reference.batch_norm_act(x, norm, relu=True))


def _prepare_norm(pool: NormPool, x: Callable[[], Tensor]) -> Ready:
    given = x()
    norm = _norm(given.shape[1], given.device)

    def both(pool: NormPool, x: Tensor) -> tuple[Tensor, ...]:
        first, second = pool(x, norm)
        return first, *torch.autograd.grad((first, second), (x, *norm[:2]), (first.detach(), second.detach()))

    def check() -> None:
        few = given.detach()[:4]
        expected = both(_eager, few.float().requires_grad_())
        tolerance = HALF_MASKS if given.dtype == torch.bfloat16 else FLOAT32
        agree(both(pool, few.requires_grad_()), expected, tolerance=tolerance)

    return Ready(lambda: both(pool, given), check)


def _drawn(images: int, channels: int, side: int, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(images, channels, side, side, generator=generator, device=device).relu()
    return x.to(dtype, memory_format=torch.channels_last).requires_grad_()


def _prepare(pool: Pool, x: Callable[[], Tensor]) -> Ready:
    given = x()

    def run() -> tuple[Tensor, Tensor]:
        first, second = pool(given)
        return first, *torch.autograd.grad((first, second), given, (first.detach(), second.detach()))

    def check() -> None:
        few = given.detach()[:4].requires_grad_()
        first, second = pool(few)
        found = first, *torch.autograd.grad((first, second), few, (first.detach(), second.detach()))
        wide = few.detach().double().requires_grad_()
        expected = reference.max_pool(wide)[0]
        gradient = torch.autograd.grad(expected, wide, 2 * expected.detach())
        agree(found, (expected, *gradient), tolerance=HALF if given.dtype == torch.bfloat16 else FLOAT32)

    return Ready(run, check)
