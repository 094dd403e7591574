"""The stem's max pooling that is timed: forward and backward for two consumers, against torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.cases.compare import FLOAT32, HALF, agree
from benchmarks.harness import Case, Ready
from fastbyol.kernels import reference
from fastbyol.kernels.max_pool import max_pool

SHAPES = {"cuda": (1024, 64, 112), "cpu": (16, 8, 32)}  # two views of 512 images of 224 px
Pool = Callable[[Tensor], tuple[Tensor, Tensor]]


def cases(device: str) -> Iterator[Case]:
    """Compare the kernel with torch's pooling, whose two gradients autograd adds."""
    images, channels, side = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = cache(partial(_drawn, images, channels, side, device, dtype))
    elements = images * channels * side**2
    # x read, z written, a byte; two dz and the byte read, dx written; z is a quarter of x
    bytes_moved = round(elements * (dtype.itemsize * (1 + 1 / 4 + 2 / 4 + 1) + 2 / 4))
    for implementation, pool in {"fastbyol": max_pool, "eager": reference.max_pool}.items():
        yield Case(
            "max_pool and gradient",
            f"{images}x{channels}x{side}x{side}",
            implementation,
            partial(_prepare, pool, x),
            dtype=str(dtype).removeprefix("torch."),
            bytes_moved=bytes_moved,
        )


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
