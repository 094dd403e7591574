"""The stem's convolution that is timed: forward and the weight's gradient, against cuDNN's on three channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.compare import FLOAT32, HALF, agree
from benchmarks.harness import Case, Ready
from fastbyol.kernels.stem import stem_convolution

SHAPES = {"cuda": (1024, 224), "cpu": (8, 64)}  # two views of 512 images of 224 px
PLANES = 64
Convolution = Callable[[Tensor, Tensor], Tensor]


def _conv2d(images: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(images, weight.to(images.dtype), stride=2, padding=3)


def _folded(images: Tensor, weight: Tensor) -> Tensor:
    return stem_convolution(images, weight.to(images.dtype))


def cases(device: str) -> Iterator[Case]:
    """Compare the forward alone, as the target's, and with the weight's gradient."""
    images, side = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = cache(partial(_drawn, images, side, device, dtype))
    inputs, outputs = images * 3 * side**2, images * PLANES * (side // 2) ** 2
    for backward in (False, True):
        for implementation, convolution in {"fastbyol": _folded, "eager": _conv2d}.items():
            yield Case(
                f"stem convolution, forward{' and weight gradient' * backward}",
                f"{images}x3x{side}x{side}",
                implementation,
                partial(_prepare, convolution, x, backward=backward),
                dtype=str(dtype).removeprefix("torch."),
                bytes_moved=(1 + backward) * (inputs + outputs) * dtype.itemsize,
            )


def _drawn(images: int, side: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images, a weight and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(images, 3, side, side, generator=generator, device=device).to(dtype)
    weight = torch.randn(PLANES, 3, 7, 7, generator=generator, device=device) / 12
    gradient = torch.randn(images, PLANES, side // 2, side // 2, generator=generator, device=device).to(dtype)
    order = torch.channels_last
    return x.contiguous(memory_format=order), weight.requires_grad_(), gradient.contiguous(memory_format=order)


def _prepare(convolution: Convolution, drawn: Callable[[], tuple[Tensor, ...]], *, backward: bool) -> Ready:
    images, weight, gradient = drawn()

    def both(convolution: Convolution, images: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            result = convolution(images, weight)
            return (result, *torch.autograd.grad(result, weight, gradient)) if backward else (result,)

    def check() -> None:
        few = images[:4], gradient[:4]
        found = both(convolution, few[0], weight, few[1])
        wide = weight.detach().double().requires_grad_()
        expected = both(_conv2d, few[0].double(), wide, few[1].double())
        agree(found, expected, tolerance=HALF if images.dtype == torch.bfloat16 else FLOAT32)

    return Ready(lambda: both(convolution, images, weight, gradient), check)
