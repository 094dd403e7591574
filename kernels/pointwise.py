"""A 1x1 convolution whose kernel also sums its output for the batch norm that follows.

With x as rows [M, K] of pixels, channels-last, and the weight [N, K], rounded to x's dtype:

    y[m, n] = sum over k of x[m, k] weight[n, k]                                        [M, N], summed in float32

and, of the rounded y, the sums that batchnorm_statistics.py makes of it: per view and channel of d = y - running mean
and of d^2. So batch norm need not read y for its statistics.

Elements moved: x and y once, where a convolution and the statistics after it move y twice. Programs of neighbouring
columns read the same x at about the same time, from the L2 cache.

Blocks of x and the weight, and results, are copied by the tensor memory accelerator of sm_90 and multiplied by warp
groups; on sm_80 the kernel is right but slow. K and N are multiples of 16 bytes, as the accelerator wants it. In 16-bit
floats; float32 is multiplied exactly and slowly.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm import channels_last
from fastbyol.kernels.batchnorm_statistics import finish, per_channel
from fastbyol.kernels.dispatch import autocast_dtype, runs_triton
from fastbyol.kernels.reference import NormParams

MADE_FOR = (9, 0)  # of an H100 and an H200
ALIGNMENT = 16  # bytes of which rows of x, weight and y are multiples
MULTIPROCESSORS = 132  # of an H100 and an H200: so many programs, times Tiles.blocks, run at the same time


class Tiles(NamedTuple):
    """Sizes of a program: rows, columns and inputs of a block, warps, blocks of x in flight.

    blocks: how many programs fit a multiprocessor of sm_90, by registers and shared memory.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    blocks: int

    def __str__(self) -> str:
        """Name the sizes as rows of a benchmark do."""
        return f"BM={self.BM} BN={self.BN} BK={self.BK} warps={self.warps} stages={self.stages}"


NARROW = Tiles(128, 64, 64, warps=4, stages=3, blocks=2)
TALL = Tiles(256, 128, 64, warps=8, stages=3, blocks=1)
CHOICES = (NARROW, TALL)
EXACT = Tiles(64, 64, 32, warps=4, stages=2, blocks=2)  # for float32, whose blocks are twice as large
# As measured on an H100 (docs/performance.md): from so many inputs, or above so many products a row, cuDNN and the
# statistics after it are faster, or nothing is known; from so many inputs and channels TALL is faster than NARROW.
DEEP, BUSY = 1024, 256 * 1024
TALL_FROM = (512, 256)
ROWS = 1024 * 14 * 14  # the fewest that were measured


def is_faster(x: Tensor, *, inputs: int, channels: int) -> bool:
    """Return whether this kernel was measured to beat cuDNN and the statistics after it.

    That is on sm_90, in bfloat16, for x of ROWS rows or more and most shapes. Off a GPU, where Triton's interpreter or
    a prediction of memory runs, inputs and channels alone decide.
    """
    if x.is_cuda and not (
        autocast_dtype(x) == torch.bfloat16 and x.numel() >= ROWS * inputs and _capability(x.device.index) == MADE_FOR
    ):
        return False
    return inputs < DEEP and inputs * channels <= BUSY


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def tiles_for(inputs: int, channels: int, dtype: torch.dtype) -> Tiles:
    """Choose the sizes for K inputs and N channels."""
    if dtype == torch.float32:
        return EXACT
    is_tall = inputs >= TALL_FROM[0] and channels >= TALL_FROM[1]
    return TALL if is_tall else NARROW


@triton.jit
def fold(tile, BM: tl.constexpr, BN: tl.constexpr, WARP_ROWS: tl.constexpr):
    """Sum the rows of a product [BM, BN] that one thread of sm_90 holds, to [WARP_ROWS, 8, BN].

    A warp holds 16 rows, a thread two of them, 8 apart, and those of the next 16 * WARP_ROWS.
    """
    return tl.sum(tl.sum(tile.reshape(BM // (16 * WARP_ROWS), WARP_ROWS, 2, 8, BN), 2), 0)


@triton.jit
def pointwise_kernel(
    x,  # blocks [BM, BK] of [groups * rows, inputs]
    weight,  # blocks [BN, BK] of [channels, inputs]
    y,  # blocks [BM, BN] of [groups * rows, channels]
    running_mean_ptr,
    partial_ptr,
    rows,
    channels,
    rows_per_split,
    STEPS: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write y and the split's sums of d and d^2, as stats_kernel does, to partial [2, G, S, C]; grid (columns, S, G).

    A block across the end of a group writes rows of the next one, too: the same numbers that the other program writes.
    """
    split, group, column = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BN
    c = column + tl.arange(0, BN)
    m = tl.arange(0, BM)
    shift = per_channel(running_mean_ptr, c, channels)
    total = tl.zeros([WARP_ROWS, 8, BN], tl.float32)
    square = tl.zeros([WARP_ROWS, 8, BN], tl.float32)
    if STEPS == 1:
        kept = weight.load([column, 0])
    last = tl.minimum((split + 1) * rows_per_split, rows)
    # one loop over blocks of rows and of inputs, so that the next rows are on their way while sums are taken
    for start in tl.range(split * rows_per_split, last, BM, flatten=True):
        row = group * rows + start
        if STEPS == 1:
            product = tl.dot(x.load([row, 0]), kept.T, input_precision="ieee")
        else:
            product = tl.zeros([BM, BN], tl.float32)
            for step in range(STEPS):
                left, right = x.load([row, step * BK]), weight.load([column, step * BK])
                product = tl.dot(left, right.T, product, input_precision="ieee")
        rounded = product.to(y.dtype)
        y.store([row, column], rounded)
        d = tl.where((m < rows - start)[:, None], rounded.to(tl.float32) - shift[None, :], 0.0)
        total += fold(d, BM, BN, WARP_ROWS)
        square += fold(d * d, BM, BN, WARP_ROWS)
    splits, groups = tl.num_programs(1), tl.num_programs(2)
    at = (group * splits + split) * channels + c
    tl.store(partial_ptr + at, tl.sum(tl.sum(total, 0), 0), mask=c < channels)
    tl.store(partial_ptr + groups * splits * channels + at, tl.sum(tl.sum(square, 0), 0), mask=c < channels)


def constants(tiles: Tiles, *, inputs: int, channels: int) -> dict[str, int]:
    """Return the kernel's constants: blocks no larger than the matrices, and what follows from them."""
    bn = min(max(int(triton.next_power_of_2(channels)), 16), tiles.BN)
    bk = min(max(int(triton.next_power_of_2(inputs)), 16), tiles.BK)
    warp_rows = min(tiles.warps, tiles.BM // 16)  # others hold other columns
    return {"STEPS": triton.cdiv(inputs, bk), "WARP_ROWS": warp_rows, "BM": tiles.BM, "BN": bn, "BK": bk}


def multiply(x: Tensor, weight: Tensor, shift: Tensor, *, groups: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return y [M, N] of x [M, K] and weight [N, K], and partial sums [2, G, S, N]; the M rows are G groups."""
    (pixels, inputs), channels = x.shape, len(weight)
    if inputs * x.element_size() % ALIGNMENT or channels * x.element_size() % ALIGNMENT:
        raise ValueError(
            f"a 1x1 convolution with statistics got {inputs} input and {channels} output channels of {x.dtype}; "
            f"give multiples of {ALIGNMENT // x.element_size()}, or use conv2d"
        )
    sizes = constants(tiles, inputs=inputs, channels=channels)
    bm, bn, bk = sizes["BM"], sizes["BN"], sizes["BK"]
    rows, columns = pixels // groups, triton.cdiv(channels, bn)
    wanted = max(MULTIPROCESSORS * tiles.blocks // (columns * groups), 1)
    rows_per_split = triton.cdiv(triton.cdiv(rows, wanted), bm) * bm
    splits = triton.cdiv(rows, rows_per_split)
    y = x.new_empty(pixels, channels)
    partial = x.new_empty((2, groups, splits, channels), dtype=torch.float32)
    pointwise_kernel[(columns, splits, groups)](
        TensorDescriptor.from_tensor(x, [bm, bk]),
        TensorDescriptor.from_tensor(weight, [bn, bk]),
        TensorDescriptor.from_tensor(y, [bm, bn]),
        shift,
        partial,
        rows,
        channels,
        rows_per_split,
        **sizes,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y, partial


class _Pointwise(torch.autograd.Function):
    """The convolution and its batch norm's statistics. Gradients are torch's; the statistics have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: NormParams, tiles: Tiles) -> tuple[Tensor, Tensor]:
        images, inputs, height, width = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(-1, inputs)
        y, partial = multiply(flat, weight.flatten(1), norm.running_mean, groups=norm.views, tiles=tiles)
        statistics = finish(partial, len(flat) // norm.views, norm)
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # the statistics have none, and none is made
        return y.view(images, height, width, -1).permute(0, 3, 1, 2), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = (*ctx.needs_input_grad[:2], False)
        form = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)  # stride, padding, dilation, transposed, its padding, groups
        dx, dweight, _ = torch.ops.aten.convolution_backward(channels_last(dy), x, weight, None, *form, needed)
        return dx, dweight, None, None


def pointwise_statistics(
    x: Tensor, weight: Tensor, norm: NormParams, *, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve x [V*B, K, H, W] with weight [N, K, 1, 1]; return [V*B, N, H, W] and batch norm's statistics of it.

    The statistics are mean and rstd [2, V, N], float32, to be given to batch_norm_act or batch_norm_add_relu; running
    statistics are updated here. tiles: the kernel's sizes, by default chosen by the shape. K and N are multiples of 8,
    in float32 of 4. See reference.pointwise_statistics.
    """
    if not runs_triton(x):
        return reference.pointwise_statistics(x, weight, norm)
    reference.check_pointwise(x, weight, norm)
    dtype = autocast_dtype(x)
    x, weight = channels_last(x.to(dtype), "x"), weight.to(dtype)
    tiles = tiles or tiles_for(x.shape[1], len(weight), dtype)
    result: tuple[Tensor, Tensor] = _Pointwise.apply(x, weight, norm, tiles)
    return result
