"""The last 1x1 convolutions of a ResNet-50's bottlenecks that are timed with the batch norm and ReLU before them.

Forward, weight's gradient and input's gradient are each a case, with what batch norm's kernels do beside it: its
statistics, which both ways need, are given. The kernel that writes dx at last is the same, too, and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.compare import HALF, agree
from benchmarks.cases.pointwise import IMAGES, STATISTICS, VIEWS, drawn, norm_of
from benchmarks.harness import Case, Ready
from fastbyol.kernels.batchnorm import apply_norm, backward_sums, batch_norm_act
from fastbyol.kernels.batchnorm_statistics import batch_statistics, finish, reduce_splits
from fastbyol.kernels.pointwise import NARROW, Tiles, flat, gradients, is_faster, pointwise_statistics, unflat
from fastbyol.kernels.pointwise_epilogue import TILES, masked_gradient
from fastbyol.kernels.pointwise_prologue import (
    GRADIENT_CHOICES,
    gradient_tiles_for,
    normed_multiply,
    normed_weight_gradient,
)
from fastbyol.kernels.reference import NormParams

SHAPES = ((64, 56, 256), (128, 28, 512), (256, 14, 1024), (512, 7, 2048))  # inputs, side, channels
Results = tuple[Tensor, ...]


class Inputs(NamedTuple):
    """What a convolution and its gradients take: x in channels-last memory, batch norm's result z of it, and dy."""

    x: Tensor
    z: Tensor
    dy: Tensor
    weight: Tensor
    norm: NormParams
    after: NormParams
    statistics: Tensor

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Scale and bias of the batch norm."""
        return self.norm.weight, self.norm.bias


def drawn_inputs(inputs: int, side: int, channels: int) -> Inputs:
    """Draw them for a GPU; half of the ReLUs are active."""
    images = IMAGES["cuda"]
    x, weight = drawn((images, inputs, side, side), channels, "cuda", torch.bfloat16)
    dy, _ = drawn((images, channels, side, side), 8, "cuda", torch.bfloat16)
    norm, after = norm_of(inputs, "cuda"), norm_of(channels, "cuda")
    statistics = batch_statistics(x, norm)
    mean, rstd = statistics
    z, _ = apply_norm(x, None, mean, rstd, norm.weight, norm.bias, relu=True)
    return Inputs(x, z, dy, weight, norm, after, statistics)


def forward_apart(given: Inputs) -> Results:
    """Normalise by a kernel, convolve as training does today."""
    z = batch_norm_act(given.x, given.norm, relu=True, statistics=given.statistics)
    channels, inputs = given.weight.shape[:2]
    if is_faster(z, inputs=inputs, channels=channels):
        return pointwise_statistics(z, given.weight, given.after)
    y = F.conv2d(z, given.weight)
    return y, batch_statistics(y, given.after)


def forward_entered(given: Inputs) -> Results:
    """Normalise in the prologue."""
    matrix, shift = given.weight.flatten(1), given.after.running_mean
    rows, sums = normed_multiply(flat(given.x), matrix, given.statistics, given.pair, shift, tiles=NARROW)
    return unflat(rows, given.x), finish(sums, len(rows) // VIEWS, given.after)


def check_forward(given: Inputs, results: Results) -> None:
    """Compare with torch's convolution of z, and the statistics with its output's."""
    y, statistics = results
    agree((y,), (F.conv2d(given.z, given.weight),), tolerance=HALF)
    moments = [torch.var_mean(view.float(), (0, 2, 3), correction=0) for view in y.chunk(VIEWS)]
    rstds = [torch.rsqrt(var + given.after.eps) for var, _ in moments]
    agree((*statistics,), (torch.stack([mean for _, mean in moments]), torch.stack(rstds)), tolerance=STATISTICS)


def weight_apart(given: Inputs) -> Results:
    """Take cuDNN's gradient, of the z that the forward kept."""
    _, dweight = gradients(given.dy, given.z, given.weight, of_x=False, of_weight=True)
    assert dweight is not None
    return (dweight,)


def weight_entered(tiles: Tiles, given: Inputs) -> Results:
    """Normalise x once more, as it is loaded."""
    dweight = normed_weight_gradient(flat(given.dy), flat(given.x), given.statistics, given.pair, tiles=tiles)
    return (dweight.view(given.weight.shape),)


def check_weight(given: Inputs, results: Results) -> None:
    """Compare with a product in float32."""
    exact = flat(given.dy).float().t() @ flat(given.z).float()
    agree((results[0].flatten(1),), (exact,), tolerance=HALF)


def input_apart(given: Inputs) -> Results:
    """Take cuDNN's gradient; a kernel reads it for the sums."""
    dz, _ = gradients(given.dy, given.x, given.weight, of_x=True, of_weight=False)
    assert dz is not None
    sums = backward_sums(dz, None, given.x, None, None, given.statistics, *given.pair, relu=True)
    return dz, reduce_splits(sums, flat(dz).shape[0] // VIEWS, totals=None, group=None)


def input_summed(given: Inputs) -> Results:
    """Mask and sum in the epilogue."""
    matrix = given.weight.flatten(1)
    rows, sums = masked_gradient(flat(given.dy), matrix, flat(given.x), given.statistics, given.pair, tiles=TILES)
    return unflat(rows, given.x), reduce_splits(sums, len(rows) // VIEWS, totals=None, group=None)


def check_input(given: Inputs, results: Results) -> None:
    """Compare with a product in float32; what cuDNN gives is masked here, as the kernel after it would do."""
    dz, sums = results
    mean, rstd = (each.repeat_interleave(len(given.x) // VIEWS, 0)[:, :, None, None] for each in given.statistics)
    exact = unflat(flat(given.dy).float() @ given.weight.flatten(1).float(), given.x) * (given.z > 0)
    xhat = (given.x - mean) * rstd
    wanted = [(exact * factor).unflatten(0, (VIEWS, -1)).sum((1, 3, 4)) for factor in (1.0, xhat)]
    found = sums[: 2 * wanted[0].numel()].view(2, VIEWS, -1)
    agree((dz * (given.z > 0), *found), (exact, *wanted), tolerance=HALF)


class Piece(NamedTuple):
    """What is timed: its name, elements moved a pixel, implementations, and their check."""

    name: str
    width: int
    implementations: dict[str, Callable[[Inputs], Results]]
    check: Callable[[Inputs, Results], None]


def pieces_of(inputs: int, channels: int) -> tuple[Piece, ...]:
    """List the pieces for K inputs and N channels; each begins with what training takes today."""
    chosen, both = gradient_tiles_for(inputs, torch.bfloat16), inputs + channels
    others = [tiles for tiles in GRADIENT_CHOICES if tiles != chosen and inputs >= tiles.BK]
    forward = {"norm apart, then today's convolution": forward_apart, "fastbyol prologue": forward_entered}
    weight: dict[str, Callable[[Inputs], Results]] = {"cuDNN": weight_apart}
    for tiles, note in ((chosen, " (chosen)"), *((other, "") for other in others)):
        weight[f"fastbyol prologue, {tiles}{note}"] = partial(weight_entered, tiles)
    gradient = {"cuDNN, then fastbyol's sums": input_apart, "fastbyol epilogue": input_summed}
    return (
        Piece("forward", both, forward, check_forward),
        Piece("weight's gradient", both, weight, check_weight),
        Piece("input's gradient and sums", both + inputs, gradient, check_input),
    )


def cases(device: str) -> Iterator[Case]:
    """Compare each piece with the kernels that training takes today; none on a CPU, where nothing is fused."""
    for inputs, side, channels in SHAPES if device == "cuda" else ():
        made = cache(partial(drawn_inputs, inputs, side, channels))
        for piece in pieces_of(inputs, channels):
            for implementation, run in piece.implementations.items():
                yield Case(
                    f"normalised 1x1 convolution, {piece.name}",
                    f"{IMAGES[device]}x{inputs}x{side}x{side} to {channels}",
                    implementation,
                    partial(_prepare, run, piece.check, made),
                    dtype="bfloat16",
                    bytes_moved=IMAGES[device] * side**2 * piece.width * torch.bfloat16.itemsize,
                )


def _prepare(
    run: Callable[[Inputs], Results], check: Callable[[Inputs, Results], None], made: Callable[[], Inputs]
) -> Ready:
    given = made()

    @torch.no_grad()
    def timed() -> Results:
        return run(given)

    def checked() -> None:
        with torch.no_grad():
            check(given, run(given))

    return Ready(timed, checked)
