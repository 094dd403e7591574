"""A 1x1 convolution that normalises its input while it loads it, and its weight's gradient, which does so once more.

With x as rows [M, K] of pixels, channels-last, in V views, batch norm's statistics [V, K] of it and the weight [N, K]:

    z = relu((x - mean) * rstd * scale + bias)                                           [M, K], rounded to x's dtype
    y[m, n] = sum over k of z[m, k] weight[n, k]                                         [M, N], summed in float32
    dweight[n, k] = sum over m of dy[m, n] z[m, k]                                       [N, K], summed in float32

z has the bits that batchnorm.py gives it, and is not written to memory. y comes with partial sums for the batch norm
after it, as in pointwise.py.

Elements moved: forward x and y, gradient x and dy, where batch norm apart from the convolution also writes and reads
z. Each program of a row of blocks normalises x for itself. Copies and products are those of pointwise.py. The
function with a backward is normed_pointwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbyol.kernels.batchnorm import normalized
from fastbyol.kernels.batchnorm_statistics import per_channel
from fastbyol.kernels.pointwise import Tiles, check_aligned, constants, fold, split_rows, store_sums

# Of a program of the gradient: rows of a step, and columns and inputs of its block, which is as large as registers let
# it be, since each block of a split reads x or dy once more from the L2 cache. No GPU has measured them yet.
SLIM = Tiles(64, 256, 64, warps=4, stages=2, blocks=2)
WIDE = Tiles(64, 256, 128, warps=8, stages=3, blocks=1)
GRADIENT_CHOICES = (SLIM, WIDE)
EXACT_GRADIENT = Tiles(32, 64, 64, warps=4, stages=2, blocks=2)  # for float32


@triton.jit
def activated(x, mean, scale, bias):
    """Return relu((x - mean) * scale + bias) in x's dtype, channels along the last dimension; NaN stays NaN."""
    v = normalized(x.to(tl.float32) - mean[None, :], scale, bias)
    return tl.where(v <= 0, 0.0, v).to(x.dtype)


@triton.jit
def normed_pointwise_kernel(
    x,  # blocks [BM, BK] of [groups * rows, inputs]
    weight,  # blocks [BN, BK] of [channels, inputs]
    y,  # blocks [1, BM, BN] of [groups, rows, channels]
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    running_mean_ptr,
    partial_ptr,
    rows,
    inputs,
    channels,
    rows_per_split,
    STEPS: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write y and the split's sums of d and d^2, as pointwise_kernel does; grid (columns, S, G).

    A block across the end of a group reads rows of the next one, but does not write them.
    """
    split, group, column = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BN
    c = column + tl.arange(0, BN)
    m, k = tl.arange(0, BM), tl.arange(0, BK)
    shift = per_channel(running_mean_ptr, c, channels)
    total = tl.zeros([WARP_ROWS, 8, BN], tl.float32)
    square = tl.zeros([WARP_ROWS, 8, BN], tl.float32)
    if STEPS == 1:
        kept = weight.load([column, 0])
        mean = per_channel(mean_ptr + group * inputs, k, inputs)
        scale = per_channel(rstd_ptr + group * inputs, k, inputs) * per_channel(scale_ptr, k, inputs)
        bias = per_channel(bias_ptr, k, inputs)
    last = tl.minimum((split + 1) * rows_per_split, rows)
    for start in tl.range(split * rows_per_split, last, BM, flatten=True):
        row = group * rows + start
        if STEPS == 1:
            z = activated(x.load([row, 0]), mean, scale, bias)
            product = tl.dot(z, kept.T, input_precision="ieee")
        else:
            product = tl.zeros([BM, BN], tl.float32)
            for step in range(STEPS):
                at = step * BK + k
                mean = per_channel(mean_ptr + group * inputs, at, inputs)
                scale = per_channel(rstd_ptr + group * inputs, at, inputs) * per_channel(scale_ptr, at, inputs)
                bias = per_channel(bias_ptr, at, inputs)
                z = activated(x.load([row, step * BK]), mean, scale, bias)
                product = tl.dot(z, weight.load([column, step * BK]).T, product, input_precision="ieee")
        rounded = product.to(y.dtype)
        y.store([group, start, column], rounded.reshape(1, BM, BN))
        d = tl.where((m < rows - start)[:, None], rounded.to(tl.float32) - shift[None, :], 0.0)
        total += fold(d, BM, BN, WARP_ROWS)
        square += fold(d * d, BM, BN, WARP_ROWS)
    store_sums(partial_ptr, total, square, split, group, c, channels)


@triton.jit
def normed_weight_gradient_kernel(
    x,  # blocks [BM, BK] of [groups * rows, inputs]
    dy,  # blocks [BM, BN] of [groups * rows, channels]
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    partial_ptr,
    rows,
    inputs,
    channels,
    rows_per_split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the split's part of dweight to partial [G, S, K, N]; grid (blocks of K and N, S, G)."""
    split, group, columns = tl.program_id(1), tl.program_id(2), tl.cdiv(channels, BN)
    first, column = tl.program_id(0) // columns * BK, tl.program_id(0) % columns * BN
    k, c, m = first + tl.arange(0, BK), column + tl.arange(0, BN), tl.arange(0, BM)
    mean = per_channel(mean_ptr + group * inputs, k, inputs)
    scale = per_channel(rstd_ptr + group * inputs, k, inputs) * per_channel(scale_ptr, k, inputs)
    bias = per_channel(bias_ptr, k, inputs)
    product = tl.zeros([BK, BN], tl.float32)
    last = tl.minimum((split + 1) * rows_per_split, rows)
    for start in tl.range(split * rows_per_split, last, BM):
        row = group * rows + start
        z = activated(x.load([row, first]), mean, scale, bias)
        z = tl.where((m < rows - start)[:, None], z, 0.0)
        right = dy.load([row, column])
        product = tl.dot(z.T, right, product, input_precision="ieee")
    at = ((group * tl.num_programs(1) + split).to(tl.int64) * inputs + k)[:, None] * channels + c[None, :]
    tl.store(partial_ptr + at, product, mask=(k < inputs)[:, None] & (c < channels)[None, :])


def gradient_tiles_for(inputs: int, dtype: torch.dtype) -> Tiles:
    """Choose the sizes of the weight's gradient for K inputs."""
    if dtype == torch.float32:
        return EXACT_GRADIENT
    return WIDE if inputs >= WIDE.BK else SLIM


def normed_multiply(
    x: Tensor, weight: Tensor, statistics: Tensor, norm: tuple[Tensor, Tensor], shift: Tensor, *, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Return y [M, N] of x [M, K] and weight [N, K], and partial sums [2, G, S, N]; the M rows are G groups.

    statistics: mean and rstd of x [2, G, K]; norm: scale and bias [K]; shift: the running mean of y [N].
    """
    check_aligned(x, weight)
    (pixels, inputs), channels, groups = x.shape, len(weight), statistics.shape[1]
    sizes = constants(tiles, inputs=inputs, channels=channels)
    bm, bn, bk = sizes["BM"], sizes["BN"], sizes["BK"]
    rows, columns = pixels // groups, triton.cdiv(channels, bn)
    rows_per_split, splits = split_rows(rows, columns * groups, tiles)
    y = x.new_empty(pixels, channels)
    partial = x.new_empty((2, groups, splits, channels), dtype=torch.float32)
    normed_pointwise_kernel[(columns, splits, groups)](
        TensorDescriptor.from_tensor(x, [bm, bk]),
        TensorDescriptor.from_tensor(weight, [bn, bk]),
        TensorDescriptor.from_tensor(y.view(groups, rows, channels), [1, bm, bn]),
        *statistics,
        *norm,
        shift,
        partial,
        rows,
        inputs,
        channels,
        rows_per_split,
        **sizes,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y, partial


def normed_weight_gradient(
    dy: Tensor, x: Tensor, statistics: Tensor, norm: tuple[Tensor, Tensor], *, tiles: Tiles
) -> Tensor:
    """Return dweight [N, K] in dy's dtype of dy [M, N] and x [M, K]; statistics and norm: as in normed_multiply."""
    (pixels, inputs), channels, groups = x.shape, dy.shape[1], statistics.shape[1]
    sizes = constants(tiles, inputs=inputs, channels=channels)
    bm, bn, bk = sizes["BM"], sizes["BN"], sizes["BK"]
    rows, blocks = pixels // groups, triton.cdiv(channels, bn) * triton.cdiv(inputs, bk)
    rows_per_split, splits = split_rows(rows, blocks * groups, tiles)
    partial = x.new_empty((groups * splits, inputs, channels), dtype=torch.float32)
    normed_weight_gradient_kernel[(blocks, splits, groups)](
        TensorDescriptor.from_tensor(x, [bm, bk]),
        TensorDescriptor.from_tensor(dy, [bm, bn]),
        *statistics,
        *norm,
        partial,
        rows,
        inputs,
        channels,
        rows_per_split,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dy.new_empty(channels, inputs).copy_(partial.sum(0).t())
