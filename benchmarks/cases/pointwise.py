"""The 1x1 convolutions of a ResNet-50 that are timed, with the statistics of the batch norms after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.compare import FLOAT32, HALF, agree
from benchmarks.harness import Case, Ready
from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm_statistics import batch_statistics
from fastbyol.kernels.pointwise import CHOICES, pointwise_statistics, tiles_for
from fastbyol.kernels.reference import NormParams
from fastbyol.model.batchnorm import EPS, MOMENTUM

VIEWS = 2
SHAPES = (  # inputs, side, channels: all of stride 1 in a ResNet-50 at 224 px
    (64, 56, 64),
    (64, 56, 256),
    (256, 56, 64),
    (256, 56, 128),
    (128, 28, 512),
    (512, 28, 128),
    (512, 28, 256),
    (256, 14, 1024),
    (1024, 14, 256),
    (1024, 14, 512),
    (512, 7, 2048),
    (2048, 7, 512),
)
IMAGES = {"cuda": 1024, "cpu": 4}  # two views of 512 images
CHECKED = 4  # images whose values are compared
STATISTICS = 1e-3  # means of up to 10^6 values are near 0, so that roundings are a larger share of them
ALONE = "cuDNN"  # to see what statistics cost: no rival, since it does less
Result = tuple[Tensor, ...]  # the convolution and its statistics, or the convolution alone
Convolution = Callable[[Tensor, Tensor, NormParams], Result]


def _conv2d(x: Tensor, weight: Tensor, _: NormParams) -> Result:
    return (F.conv2d(x, weight),)


def _apart(x: Tensor, weight: Tensor, norm: NormParams) -> Result:
    """Convolve by cuDNN; a kernel of its own reads the result for the statistics, as training does by default."""
    y = F.conv2d(x, weight)
    return y, batch_statistics(y, norm)


def rivals(device: str, inputs: int, channels: int) -> Iterator[tuple[str, Convolution]]:
    """Yield the implementations; the sizes that training takes come first among ours."""
    if device == "cpu":
        yield "fastbyol", pointwise_statistics
        yield "eager", reference.pointwise_statistics
        return
    yield "cuDNN, then fastbyol's statistics", _apart
    chosen = tiles_for(inputs, channels, torch.bfloat16)
    others = [tiles for tiles in CHOICES if tiles != chosen and channels >= tiles.BN]
    for tiles, note in ((chosen, " (chosen)"), *((other, "") for other in others)):
        yield f"fastbyol pointwise, {tiles}{note}", partial(pointwise_statistics, tiles=tiles)
    yield ALONE, _conv2d


def cases(device: str) -> Iterator[Case]:
    """Compare the forward, as the target's, with each choice of tiles that the channels fill."""
    images, dtype = IMAGES[device], torch.bfloat16 if device == "cuda" else torch.float32
    for inputs, side, channels in SHAPES if device == "cuda" else SHAPES[-2:]:
        shape = images, inputs, side, side
        inputs_of = cache(partial(drawn, shape, channels, device, dtype))
        for implementation, convolution in rivals(device, inputs, channels):
            yield Case(
                "1x1 convolution without statistics" if implementation == ALONE else "1x1 convolution and statistics",
                f"{images}x{inputs}x{side}x{side} to {channels}",
                implementation,
                partial(_prepare, convolution, inputs_of),
                dtype=str(dtype).removeprefix("torch."),
                bytes_moved=images * side**2 * (inputs + channels) * dtype.itemsize,
            )


def drawn(shape: tuple[int, ...], channels: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw x in channels-last memory and a weight."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(channels, shape[1], 1, 1, generator=generator, device=device) / shape[1] ** 0.5
    return x, weight.to(dtype)


def norm_of(channels: int, device: str) -> NormParams:
    """Return a batch norm that changes nothing."""
    zeros, ones = (torch.full((channels,), value, device=device) for value in (0.0, 1.0))
    return NormParams(ones, zeros, zeros.clone(), ones.clone(), None, views=VIEWS, momentum=MOMENTUM, eps=EPS)


def _prepare(convolution: Convolution, inputs_of: Callable[[], tuple[Tensor, Tensor]]) -> Ready:
    x, weight = inputs_of()
    norm = norm_of(len(weight), x.device.type)

    @torch.no_grad()
    def run() -> Result:
        return convolution(x, weight, norm)

    def check() -> None:
        y, *statistics = run()
        expected = F.conv2d(x[-CHECKED:].double(), weight.double())
        agree((y[-CHECKED:],), (expected,), tolerance=HALF if x.dtype == torch.bfloat16 else FLOAT32)
        if statistics:
            moments = [torch.var_mean(view.float(), (0, 2, 3), correction=0) for view in y.chunk(VIEWS)]
            mean = torch.stack([mean for _, mean in moments])
            rstd = torch.stack([torch.rsqrt(var + EPS) for var, _ in moments])
            agree((*statistics[0],), (mean, rstd), tolerance=STATISTICS)

    return Ready(run, check)
