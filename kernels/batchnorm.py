"""Batch norm fused with a residual sum and ReLU, with separate statistics for each view.

x is [V*B, C] or [V*B, C, H, W], view-major, treated as V groups of R = B*H*W rows of C channels (channels-last).
Per group and channel, in float32:

    forward   v = (x - mean) * rstd * weight + bias [+ residual],  z = relu(v)
    backward  g = dz where the ReLU is active, else 0;  xhat = (x - mean) * rstd
              dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum(g * xhat),  dbias = sum(g)

batchnorm_statistics.py computes the sums over rows, and mean, rstd and running statistics from them.

Elements moved per element of x; z, residual and gradients have x's width:

    forward   sums: x                       apply: x, z               2 reads, 1 write
      add     sums: x                       apply: x, residual, z     3 reads, 1 write, 1 bit of mask written
    backward  sums: dz, x                   apply: dz, x, dx          4 reads, 1 write
      add     sums: 1 or 2 dz, x, mask, g   apply: g, x, dx           4 or 5 reads, 2 writes, 1 bit of mask read

g is d(residual). Without a residual the ReLU's mask is recomputed from x; with one, it is stored as one bit per
element. If both results of `batch_norm_add_relu` were used, their two gradients are added here.

With a process group, one all-reduce forward and one backward add the sums and counts of all ranks. dweight and dbias
stay local, as in torch's SyncBatchNorm.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm_statistics import (
    SUMS,
    WARPS,
    batch_statistics,
    column_block,
    fold,
    offsets,
    per_channel,
    reduce_splits,
    sum_launch,
)
from fastbyol.kernels.dispatch import runs_triton
from fastbyol.kernels.recompute import recomputed
from fastbyol.kernels.reference import NormParams

Result = TypeVar("Result")
TILE_BYTES = 4096  # of x per program at a time: two 128-bit accesses per thread


@triton.jit
def normalized(centered, scale, bias):
    """Compute v without the residual; an explicit fma makes forward and backward round in the same way."""
    return tl.fma(centered, scale[None, :], bias[None, :])


@triton.jit
def apply_kernel(
    x_ptr,
    residual_ptr,
    z_ptr,
    mask_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    channels,
    eps,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write z and, if mask_ptr is given, one bit per element: 1 where the ReLU is active. Grid (tiles of a group, G).

    If eps is given, as in evaluation, rstd_ptr holds the variance.
    """
    group, columns = tl.program_id(1), tl.cdiv(channels, BC)
    r = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    column = tl.program_id(0) % columns
    c = column * BC + tl.arange(0, BC)
    at, inside = offsets(group, rows, channels, r, c)
    mean = per_channel(mean_ptr + group * channels, c, channels)
    rstd = per_channel(rstd_ptr + group * channels, c, channels)
    if eps is not None:
        rstd = 1.0 / tl.sqrt(rstd + eps)
    weight = per_channel(weight_ptr, c, channels)
    bias = per_channel(bias_ptr, c, channels)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = normalized(x - mean[None, :], rstd * weight, bias)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        bits = tl.where(v <= 0, 0, 1).reshape(BM, BC // 8, 8) << tl.arange(0, 8)[None, None, :]
        c8 = column * (BC // 8) + tl.arange(0, BC // 8)
        byte_at, byte_inside = offsets(group, rows, tl.cdiv(channels, 8), r, c8)
        tl.store(mask_ptr + byte_at, tl.sum(bits, 2).to(tl.uint8), mask=byte_inside)
    if RELU:
        v = tl.where(v <= 0, 0.0, v)  # NaN stays NaN, as in torch
    tl.store(z_ptr + at, v.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_sums_kernel(
    dz_ptr,
    other_dz_ptr,
    x_ptr,
    mask_ptr,
    g_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    rows,
    channels,
    rows_per_split,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the split's sums of g and g * xhat to partial [2, G, S, C] and, if given, g; grid (columns, S, G).

    The ReLU's mask is recomputed from x (RELU), read from mask_ptr, or absent.
    """
    split, group = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c8 = tl.program_id(0) * (BC // 8) + tl.arange(0, BC // 8)
    mean = per_channel(mean_ptr + group * channels, c, channels)
    rstd = per_channel(rstd_ptr + group * channels, c, channels)
    weight = per_channel(weight_ptr, c, channels)
    bias = per_channel(bias_ptr, c, channels)
    total = tl.zeros([SUMS // BC, BC], tl.float32)
    product = tl.zeros([SUMS // BC, BC], tl.float32)
    for start in range(0, rows_per_split, BM):
        r = split * rows_per_split + start + tl.arange(0, BM)
        at, inside = offsets(group, rows, channels, r, c)
        centered = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        g = tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if other_dz_ptr is not None:
            g += tl.load(other_dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(normalized(centered, rstd * weight, bias) <= 0, 0.0, g)
        if mask_ptr is not None:
            byte_at, byte_inside = offsets(group, rows, tl.cdiv(channels, 8), r, c8)
            byte = tl.load(mask_ptr + byte_at, mask=byte_inside, other=0).to(tl.int32)
            bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
            g = tl.where(bits.reshape(BM, BC) == 0, 0.0, g)
        if g_ptr is not None:
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=inside)
        total += fold(g, BM, BC)
        product += fold(g * centered, BM, BC)
    splits, groups = tl.num_programs(1), tl.num_programs(2)
    at = (group * splits + split) * channels + c
    tl.store(partial_ptr + at, tl.sum(total, 0), mask=c < channels)
    tl.store(partial_ptr + groups * splits * channels + at, tl.sum(product, 0) * rstd, mask=c < channels)


@triton.jit
def backward_apply_kernel(
    g_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    rows,
    channels,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write dx; with RELU, g_ptr holds dz, which is masked here. Grid (tiles of a group, G)."""
    group, groups, columns = tl.program_id(1), tl.num_programs(1), tl.cdiv(channels, BC)
    r = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    at, inside = offsets(group, rows, channels, r, c)
    mean = per_channel(mean_ptr + group * channels, c, channels)
    rstd = per_channel(rstd_ptr + group * channels, c, channels)
    weight = per_channel(weight_ptr, c, channels)
    per_count = 1.0 / tl.load(sums_ptr + 2 * groups * channels + group)
    g_mean = per_channel(sums_ptr + group * channels, c, channels) * per_count
    product = per_channel(sums_ptr + (groups + group) * channels, c, channels)
    slope = product * per_count * rstd
    centered = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = rstd * weight
    if RELU:
        bias = per_channel(bias_ptr, c, channels)
        g = tl.where(normalized(centered, scale, bias) <= 0, 0.0, g)
    dx = (g - g_mean[None, :] - centered * slope[None, :]) * scale[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@functools.cache
def _warn_of_copy(name: str) -> None:
    logging.getLogger(__name__).warning(
        "batch norm got %s in another memory format and copies it to channels-last, which is slower", name
    )


def channels_last(x: Tensor, name: str | None = None) -> Tensor:
    """Return x in channels-last memory; warn once of a copy if a name is given (gradients of poolings need copies)."""
    order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    if name is not None and not x.is_contiguous(memory_format=order):
        _warn_of_copy(name)
    return x.contiguous(memory_format=order)


def _apply_launch(x: Tensor, groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid (tiles, G) and sizes that cover each group of x by tiles."""
    channels = x.shape[1]
    rows = x.numel() // (channels * groups)
    bc = column_block(channels)
    bm = TILE_BYTES // x.element_size() // bc
    tiles = triton.cdiv(rows, bm) * triton.cdiv(channels, bc)
    return (tiles, groups), {"rows": rows, "channels": channels, "BM": bm, "BC": bc}


def _apply(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool,
    keep_mask: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return z and, with keep_mask, the ReLU's mask [M, C / 8] uint8; mean and rstd are [G, C].

    If eps is given, as in evaluation, rstd is the variance.
    """
    channels = x.shape[1]
    z = torch.empty_like(x)
    mask_shape = (x.numel() // channels, triton.cdiv(channels, 8))
    mask = x.new_empty(mask_shape, dtype=torch.uint8) if keep_mask else None
    grid, sizes = _apply_launch(x, len(mean))
    apply_kernel[grid](x, residual, z, mask, mean, rstd, weight, bias, **sizes, eps=eps, RELU=relu, num_warps=WARPS)
    return z, mask


class _BatchNorm(torch.autograd.Function):
    """Batch norm with an optional residual; with one, z is returned twice. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        statistics: Tensor,
        relu: bool,
        keep_mask: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        mean, rstd = statistics
        z, mask = _apply(x, residual, mean, rstd, weight, bias, relu=relu, keep_mask=keep_mask)
        ctx.save_for_backward(x, mask, statistics, weight, bias)
        ctx.relu, ctx.group, ctx.residual_dtype = relu, group, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)  # an unused result has no gradient, and none is read
        return z if residual is None else (z, z.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, statistics, weight, bias = ctx.saved_tensors
        dz, other = (*(channels_last(g) for g in grads if g is not None), None)[:2]
        assert dz is not None, "autograd asks for a backward only where a gradient arrives"
        mean, rstd = statistics
        views, channels = mean.shape
        has_residual = ctx.residual_dtype is not None
        g = torch.empty_like(x, dtype=ctx.residual_dtype) if has_residual else None
        recompute = ctx.relu and mask is None
        grid, sizes = sum_launch(x, views, tile_bytes=TILE_BYTES)
        partial = statistics.new_empty(2, views, grid[1], channels)
        backward_sums_kernel[grid](
            dz, other, x, mask, g, mean, rstd, weight, bias, partial, **sizes, RELU=recompute, num_warps=WARPS
        )
        dbias, dweight = torch.empty_like(bias), torch.empty_like(weight)
        sums = reduce_splits(partial, sizes["rows"], totals=(dbias, dweight), group=ctx.group)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            tiles, sizes = _apply_launch(x, views)
            backward_apply_kernel[tiles](
                dz if g is None else g, x, dx, mean, rstd, weight, bias, sums, **sizes, RELU=recompute, num_warps=WARPS
            )
        return dx, g, dweight, dbias, None, None, None, None


def prepare(x: Tensor, norm: NormParams, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Check x; return it in channels-last memory with mean and rstd [2, G, C].

    They are those given, or computed here, which updates the running statistics.
    """
    reference.check_views(x, norm)
    x = channels_last(x, "x")
    return x, batch_statistics(x, norm) if statistics is None else statistics


def _batch_norm(x: Tensor, residual: Tensor | None, norm: NormParams, statistics: Tensor | None, *, relu: bool) -> Any:
    x, statistics = prepare(x, norm, statistics)
    keep_mask = residual is not None and torch.is_grad_enabled()
    return _BatchNorm.apply(x, residual, norm.weight, norm.bias, statistics, relu, keep_mask, norm.group)


def batch_norm_act(x: Tensor, norm: NormParams, *, relu: bool, statistics: Tensor | None = None) -> Tensor:
    """Normalise x with the batch statistics of each view, then apply ReLU if `relu`; see reference.batch_norm_act.

    statistics: those of x, where pointwise.py computed them, and updated the running ones, with x.
    """
    if statistics is None and not runs_triton(x):
        return reference.batch_norm_act(x, norm, relu=relu)
    z: Tensor = _batch_norm(x, None, norm, statistics, relu=relu)
    return z


def batch_norm_act_then(
    consumer: Callable[[Tensor], Result], x: Tensor, norm: NormParams, *, relu: bool, statistics: Tensor | None = None
) -> Result:
    """Return consumer(batch_norm_act(x, ...)); its backward recomputes the normalised x instead of keeping it.

    This saves memory of x's size and costs one read and one write of it; x is kept anyway for batch norm's own
    backward. The results have the same bits. x must be a tensor for which dispatch.runs_triton is true.
    """
    x, statistics = prepare(x, norm, statistics)
    weight, bias = norm.weight, norm.bias
    z: Tensor = _BatchNorm.apply(x, None, weight, bias, statistics, relu, False, norm.group)
    kept = x.detach()

    def recompute_z() -> Tensor:
        mean, rstd = statistics
        return _apply(kept, None, mean, rstd, weight, bias, relu=relu)[0]

    with recomputed(z, recompute_z):
        return consumer(z)


def batch_norm_add_relu(
    x: Tensor, residual: Tensor, norm: NormParams, *, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return relu(batch norm + residual) twice, once for each consumer; see reference.batch_norm_add_relu.

    Both share memory. Either gradient may be missing; two are added inside the backward kernel. statistics: as in
    batch_norm_act.
    """
    if statistics is None and not runs_triton(x):
        return reference.batch_norm_add_relu(x, residual, norm)
    reference.check_residual(x, residual)
    residual = channels_last(residual, "residual")
    twins: tuple[Tensor, Tensor] = _batch_norm(x, residual, norm, statistics, relu=True)
    return twins


def batch_norm_eval(x: Tensor, residual: Tensor | None, norm: NormParams, *, relu: bool) -> Tensor:
    """Normalise x with the running statistics, add the residual, apply ReLU; see reference.batch_norm_eval.

    One launch with one read and one write; plain torch if gradients are enabled, which is rare in evaluation.
    """
    if torch.is_grad_enabled() or not runs_triton(x):
        return reference.batch_norm_eval(x, residual, norm, relu=relu)
    reference.check_channels(x, norm.weight)
    if residual is not None:
        reference.check_residual(x, residual)
        residual = channels_last(residual, "residual")
    x = channels_last(x, "x")
    mean, var = norm.running_mean[None], norm.running_var[None]
    return _apply(x, residual, mean, var, norm.weight, norm.bias, relu=relu, eps=norm.eps)[0]
