"""The gradient of a 1x1 convolution's input that also takes it through the ReLU before it and sums it for batch norm.

With z = relu((x - mean) * rstd * scale + bias) the input, x as rows [M, K] of pixels, channels-last, in V views, and
the weight [N, K]:

    g[m, k] = sum over n of dy[m, n] weight[n, k] where z[m, k] is active, else 0      [M, K], rounded to x's dtype

and, of the rounded g, the sums that batchnorm.py's backward takes: per view and channel of g and of g * xhat, with
xhat = (x - mean) * rstd. The mask is computed from x.

Elements moved: dy, x and g once, where a gradient and the sums after it move g twice. Copies and products are those of
pointwise.py. The function with a backward is normed_pointwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbyol.kernels.batchnorm import normalized
from fastbyol.kernels.batchnorm_statistics import per_channel
from fastbyol.kernels.pointwise import NARROW, Tiles, check_aligned, constants, fold, split_rows, store_sums

# The gradient's products are those of a convolution of N inputs and K channels; x takes registers beside them, so that
# larger blocks do not fit. No GPU has measured it yet.
TILES = NARROW


@triton.jit
def masked_gradient_kernel(
    dy,  # blocks [BM, BN] of [groups * rows, channels]
    weight,  # blocks [BN, BK] of [channels, inputs]
    x,  # blocks [BM, BK] of [groups * rows, inputs]
    g,  # blocks [1, BM, BK] of [groups, rows, inputs]
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    partial_ptr,
    rows,
    inputs,
    rows_per_split,
    STEPS: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write g and the split's sums of g and g * xhat to partial [2, G, S, K]; grid (columns, S, G).

    A block across the end of a group reads rows of the next one, but does not write them.
    """
    split, group, column = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BK
    k, m = column + tl.arange(0, BK), tl.arange(0, BM)
    mean = per_channel(mean_ptr + group * inputs, k, inputs)
    rstd = per_channel(rstd_ptr + group * inputs, k, inputs)
    scale = rstd * per_channel(scale_ptr, k, inputs)
    bias = per_channel(bias_ptr, k, inputs)
    total = tl.zeros([WARP_ROWS, 8, BK], tl.float32)
    product = tl.zeros([WARP_ROWS, 8, BK], tl.float32)
    last = tl.minimum((split + 1) * rows_per_split, rows)
    for start in tl.range(split * rows_per_split, last, BM, flatten=True):
        row = group * rows + start
        dz = tl.zeros([BM, BK], tl.float32)
        for step in range(STEPS):
            left, right = dy.load([row, step * BN]), weight.load([step * BN, column])
            dz = tl.dot(left, right, dz, input_precision="ieee")
        inside = (m < rows - start)[:, None]
        centered = tl.where(inside, x.load([row, column]).to(tl.float32) - mean[None, :], 0.0)
        is_active = inside & ~(normalized(centered, scale, bias) <= 0)  # NaN stays NaN, as in torch
        rounded = tl.where(is_active, dz, 0.0).to(g.dtype)
        g.store([group, start, column], rounded.reshape(1, BM, BK))
        wide = rounded.to(tl.float32)
        total += fold(wide, BM, BK, WARP_ROWS)
        product += fold(wide * centered, BM, BK, WARP_ROWS)
    store_sums(partial_ptr, total, product * rstd[None, None, :], split, group, k, inputs)


def masked_gradient(
    dy: Tensor, weight: Tensor, x: Tensor, statistics: Tensor, norm: tuple[Tensor, Tensor], *, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Return g [M, K] of dy [M, N], weight [N, K] and x [M, K], and partial sums [2, G, S, K]; the rows are G groups.

    statistics: mean and rstd of x [2, G, K]; norm: scale and bias [K].
    """
    check_aligned(x, weight)
    (pixels, inputs), channels, groups = x.shape, len(weight), statistics.shape[1]
    sizes = constants(tiles, inputs=channels, channels=inputs)  # what is summed over are the convolution's channels
    bm, bk, bn = sizes["BM"], sizes["BN"], sizes["BK"]
    rows, columns = pixels // groups, triton.cdiv(inputs, bk)
    rows_per_split, splits = split_rows(rows, columns * groups, tiles)
    g = torch.empty_like(x)
    partial = x.new_empty((2, groups, splits, inputs), dtype=torch.float32)
    masked_gradient_kernel[(columns, splits, groups)](
        TensorDescriptor.from_tensor(dy, [bm, bn]),
        TensorDescriptor.from_tensor(weight, [bn, bk]),
        TensorDescriptor.from_tensor(x, [bm, bk]),
        TensorDescriptor.from_tensor(g.view(groups, rows, inputs), [1, bm, bk]),
        *statistics,
        *norm,
        partial,
        rows,
        inputs,
        rows_per_split,
        **(sizes | {"BN": bn, "BK": bk}),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return g, partial
