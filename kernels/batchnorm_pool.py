"""Batch norm, ReLU and the stem's max pooling in one: the normalised feature map is never written.

x [V*B, C, H, W] are V groups of B images in channels-last memory, z [V*B, C, OH, OW] the pooled result; v, z, g and the
statistics as in batchnorm.py, windows and places as in max_pool.py.

    forward   z = the largest v of a window, v rounded to x's dtype as if it had been written; place = its position
    backward  g = the sum of the windows' gradients where v is the largest and its ReLU active; dx from g as ever

Elements moved, with z a quarter of x: forward, after the statistics, reads x and writes z and a byte, where batch norm
and pooling apart read 2 and write 5/4 of x. Backward, both kernels read x, one or two dz and the byte, and one writes
dx: 5/2 to 3 reads and 1 write, where pooling and batch norm apart read 17/4 to 9/2 and write 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm import channels_last, normalized, prepare
from fastbyol.kernels.batchnorm_statistics import (
    SUMS,
    column_block,
    fold,
    per_channel,
    reduce_splits,
    sum_launch,
)
from fastbyol.kernels.dispatch import runs_triton
from fastbyol.kernels.max_pool import TILE, WARPS, out_side, square_gradients, square_offsets
from fastbyol.kernels.reference import NormParams


@triton.jit
def _channel_params(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, c, channels):
    """Return mean, rstd, scale and bias of a group's channels c."""
    mean = per_channel(mean_ptr + group * channels, c, channels)
    rstd = per_channel(rstd_ptr + group * channels, c, channels)
    return mean, rstd, rstd * per_channel(weight_ptr, c, channels), per_channel(bias_ptr, c, channels)


@triton.jit
def _locate(p, group, images, out_height, out_width):
    """Return whether pixels p of a group's z exist, their image (int64), row and column."""
    line = p // out_width
    image = (group * images + line // out_height).to(tl.int64)
    return p < images * out_height * out_width, image, line % out_height, p % out_width


@triton.jit
def norm_pool_kernel(
    x_ptr,
    z_ptr,
    place_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    images,
    height,
    width,
    out_height,
    out_width,
    channels,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write z and, if given, the places; grid (tiles of the B*OH*OW pixels of a group's z, columns, G)."""
    group = tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, _, scale, bias = _channel_params(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, c, channels)
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    exists, image, i, j = _locate(p, group, images, out_height, out_width)
    top, left = 2 * i - 1, 2 * j - 1
    largest = tl.full([BM, BC], float("-inf"), tl.float32)
    place = tl.zeros([BM, BC], tl.int32) + (tl.where(top < 0, 3, 0) + tl.where(left < 0, 1, 0))[:, None]
    for k in tl.static_range(9):
        h, w = top + k // 3, left + k % 3
        inside = (exists & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None] & (c < channels)[None, :]
        at = ((image * height + h) * width + w)[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = normalized(x - mean[None, :], scale, bias)
        v = tl.where(v <= 0, 0.0, v).to(z_ptr.dtype.element_ty).to(tl.float32)  # NaN stays NaN
        v = tl.where(inside, v, float("-inf"))
        is_larger = (v > largest) | (v != v)  # noqa: PLR0124  # NaN wins, as in torch
        largest = tl.where(is_larger, v, largest)
        place = tl.where(is_larger, k, place)
    at = ((image * out_height + i) * out_width + j)[:, None] * channels + c[None, :]
    mask = exists[:, None] & (c < channels)[None, :]
    tl.store(z_ptr + at, largest.to(z_ptr.dtype.element_ty), mask=mask)
    if place_ptr is not None:
        tl.store(place_ptr + at, place.to(tl.uint8), mask=mask)


@triton.jit
def _masked(g, x_ptr, at, mask, mean, scale, bias):
    """Return g where the ReLU of x is active, else 0, and x - mean."""
    centered = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    return tl.where(normalized(centered, scale, bias) <= 0, 0.0, g), centered


@triton.jit
def norm_pool_sums_kernel(
    dz_ptr,
    other_dz_ptr,
    place_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    images,
    height,
    width,
    out_height,
    out_width,
    channels,
    pixels_per_split,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the split's sums of g and g * xhat to partial [2, G, S, C]; grid (columns, S, G)."""
    split, group = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mean, rstd, scale, bias = _channel_params(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, c, channels)
    total = tl.zeros([SUMS // BC, BC], tl.float32)
    product = tl.zeros([SUMS // BC, BC], tl.float32)
    for start in range(0, pixels_per_split, BM):
        p = split * pixels_per_split + start + tl.arange(0, BM)
        inside, image, i, j = _locate(p, group, images, out_height, out_width)
        four = square_gradients(
            dz_ptr, other_dz_ptr, place_ptr, image, i, j, out_height, out_width, c, inside, channels
        )
        at, exists, has_right, has_lower = square_offsets(image, i, j, height, width, channels, c, inside)
        below = at + width * channels
        g, centered = _masked(four[0], x_ptr, at, exists, mean, scale, bias)
        total += fold(g, BM, BC)
        product += fold(g * centered, BM, BC)
        g, centered = _masked(four[1], x_ptr, at + channels, has_right, mean, scale, bias)
        total += fold(g, BM, BC)
        product += fold(g * centered, BM, BC)
        g, centered = _masked(four[2], x_ptr, below, has_lower, mean, scale, bias)
        total += fold(g, BM, BC)
        product += fold(g * centered, BM, BC)
        g, centered = _masked(four[3], x_ptr, below + channels, has_lower & has_right, mean, scale, bias)
        total += fold(g, BM, BC)
        product += fold(g * centered, BM, BC)
    splits, groups = tl.num_programs(1), tl.num_programs(2)
    at = (group * splits + split) * channels + c
    tl.store(partial_ptr + at, tl.sum(total, 0), mask=c < channels)
    tl.store(partial_ptr + groups * splits * channels + at, tl.sum(product, 0) * rstd, mask=c < channels)


@triton.jit
def _store_dx(g, x_ptr, dx_ptr, at, mask, mean, scale, bias, g_mean, slope):
    g, centered = _masked(g, x_ptr, at, mask, mean, scale, bias)
    dx = (g - g_mean[None, :] - centered * slope[None, :]) * scale[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_pool_backward_kernel(
    dz_ptr,
    other_dz_ptr,
    place_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    images,
    height,
    width,
    out_height,
    out_width,
    channels,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write dx in squares of 2x2, one for each pixel of z; grid (tiles of the pixels of a group's z, columns, G)."""
    group, groups = tl.program_id(2), tl.num_programs(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, rstd, scale, bias = _channel_params(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, c, channels)
    per_count = 1.0 / tl.load(sums_ptr + 2 * groups * channels + group)
    g_mean = per_channel(sums_ptr + group * channels, c, channels) * per_count
    slope = per_channel(sums_ptr + (groups + group) * channels, c, channels) * per_count * rstd
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    inside, image, i, j = _locate(p, group, images, out_height, out_width)
    four = square_gradients(dz_ptr, other_dz_ptr, place_ptr, image, i, j, out_height, out_width, c, inside, channels)
    at, exists, has_right, has_lower = square_offsets(image, i, j, height, width, channels, c, inside)
    below = at + width * channels
    _store_dx(four[0], x_ptr, dx_ptr, at, exists, mean, scale, bias, g_mean, slope)
    _store_dx(four[1], x_ptr, dx_ptr, at + channels, has_right, mean, scale, bias, g_mean, slope)
    _store_dx(four[2], x_ptr, dx_ptr, below, has_lower, mean, scale, bias, g_mean, slope)
    _store_dx(four[3], x_ptr, dx_ptr, below + channels, has_lower & has_right, mean, scale, bias, g_mean, slope)


def _tile(channels: int) -> dict[str, int]:
    bc = column_block(channels)
    return {"BM": TILE // bc, "BC": bc}


def _sides(x: Tensor, groups: int) -> dict[str, int]:
    """Return the kernels' sizes for x [G*B, C, H, W]."""
    count, channels, height, width = x.shape
    out = {"out_height": out_side(height), "out_width": out_side(width)}
    return {"images": count // groups, "height": height, "width": width, **out, "channels": channels}


class _NormPool(torch.autograd.Function):
    """Batch norm, ReLU and max pooling of x, its result returned twice; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: Tensor,
        keeps_places: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        mean, rstd = statistics
        groups, channels = mean.shape
        sides, tile = _sides(x, groups), _tile(channels)
        shape = (x.shape[0], channels, sides["out_height"], sides["out_width"])
        z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        pixels = z.numel() // channels
        places = x.new_empty((pixels, channels), dtype=torch.uint8) if keeps_places else None
        grid = (triton.cdiv(pixels // groups, tile["BM"]), triton.cdiv(channels, tile["BC"]), groups)
        norm_pool_kernel[grid](x, z, places, mean, rstd, weight, bias, **sides, **tile, num_warps=WARPS)
        ctx.save_for_backward(x, places, statistics, weight, bias)
        ctx.group = group
        ctx.set_materialize_grads(False)  # an unused result has no gradient, and none is read
        return z, z.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, places, statistics, weight, bias = ctx.saved_tensors
        dz, other = (*(channels_last(g) for g in grads if g is not None), None)[:2]
        assert dz is not None, "autograd asks for a backward only where a gradient arrives"
        mean, rstd = statistics
        groups, channels = mean.shape
        sides, tile = _sides(x, groups), _tile(channels)
        grid, split = sum_launch(dz, groups, tile_bytes=TILE * dz.element_size())
        partial = statistics.new_empty(2, groups, grid[1], channels)
        norms = (mean, rstd, weight, bias)
        norm_pool_sums_kernel[grid](
            dz,
            other,
            places,
            x,
            *norms,
            partial,
            **sides,
            pixels_per_split=split["rows_per_split"],
            **tile,
            num_warps=WARPS,
        )
        dbias, dweight = torch.empty_like(bias), torch.empty_like(weight)
        rows = x.numel() // (channels * groups)
        sums = reduce_splits(partial, rows, totals=(dbias, dweight), group=ctx.group)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            tiles = (triton.cdiv(split["rows"], tile["BM"]), grid[0], groups)
            norm_pool_backward_kernel[tiles](dz, other, places, x, dx, *norms, sums, **sides, **tile, num_warps=WARPS)
        return dx, dweight, dbias, None, None, None


def batch_norm_relu_pool(x: Tensor, norm: NormParams) -> tuple[Tensor, Tensor]:
    """Return the 3x3 max pooling, stride 2, padding 1, of relu(batch norm of x) twice, once for each consumer.

    x is [V*B, C, H, W], view-major; the results are [V*B, C, ceil(H/2), ceil(W/2)]. Raises ValueError as
    reference.batch_norm_act does. Both results share memory. Either gradient may be missing; two are added inside the
    backward kernels. The values are those of batch_norm_act and max_pool, bit for bit.
    """
    if not runs_triton(x):
        return reference.max_pool(reference.batch_norm_act(x, norm, relu=True))
    x, statistics = prepare(x, norm)
    twins: tuple[Tensor, Tensor] = _NormPool.apply(
        x, norm.weight, norm.bias, statistics, torch.is_grad_enabled(), norm.group
    )
    return twins


def batch_norm_relu_pool_eval(x: Tensor, norm: NormParams) -> tuple[Tensor, Tensor]:
    """Return the 3x3 max pooling of relu(batch norm of x by the running statistics) twice, as batch_norm_relu_pool.

    Plain torch if gradients are enabled, which is rare in evaluation.
    """
    if torch.is_grad_enabled() or not runs_triton(x):
        return reference.max_pool(reference.batch_norm_eval(x, None, norm, relu=True))
    reference.check_channels(x, norm.weight)
    statistics = torch.stack((norm.running_mean, torch.rsqrt(norm.running_var + norm.eps)))[:, None]
    twins: tuple[Tensor, Tensor] = _NormPool.apply(
        channels_last(x, "x"), norm.weight, norm.bias, statistics, False, None
    )
    return twins
