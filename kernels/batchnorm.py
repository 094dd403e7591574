"""Know batch norm fused with a residual sum and ReLU, its statistics taken per view: a population of its own.

x is [V*B, C] or [V*B, C, H, W], view-major, seen as V groups of R = B*H*W rows of C channels (channels-last memory).
Per group and channel, in float32:

    forward   v = (x - mean) * rstd * weight + bias [+ residual],  z = relu(v)
    backward  g = dz where the ReLU passed, else 0;  xhat = (x - mean) * rstd
              dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum(g * xhat),  dbias = sum(g)

Sums are taken of x - shift, shift being the running mean, so that E[d^2] - E[d]^2 does not cancel. Every program sums a
split of a group's rows, then the splits are added in a fixed order: results do not change from run to run.

Elements moved each way, per element of x; z, residual and gradients have x's width:

    forward   sums: x                       apply: x, z               2 reads, 1 write
      add     sums: x                       apply: x, residual, z     3 reads, 1 write, 1 bit of mask written
    backward  sums: dz, x                   apply: dz, x, dx          4 reads, 1 write
      add     sums: 1 or 2 dz, x, mask, g   apply: g, x, dx           4 or 5 reads, 2 writes, 1 bit of mask read

g is d(residual). Without a residual the ReLU's mask is computed again from x, with one, a bit an element keeps it. Two
gradients are summed here when the two results of `batch_norm_add_relu` went to two consumers.

With a process group, the sums and the count of all ranks are added by one all-reduce forward and one backward. The
shift must be equal on all ranks: it is, once running statistics started equal. dweight and dbias stay local, as in
torch's SyncBatchNorm.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels import reference
from fastbyol.kernels.dispatch import runs_triton

WARPS = 4
WIDEST = 64  # channels of a tile: whole 128-byte lines of bf16; wider ones exchange weights through shared memory
TILE_BYTES = 4096  # of x that a program holds at a time: two 128-bit accesses a thread
STATS_TILE_BYTES = 8192  # where x alone is read: as many bytes in flight as in the others
SUMS = tl.constexpr(1024)  # accumulators of each sum of a program, 8 a thread
SPLIT_TILES = 4  # a program that sums does at least these, so that partial sums are a small share of the bytes
PROGRAMS = 768  # that sum at a time: 6 blocks of 128 threads and 80 registers on each of 128 multiprocessors
FINALIZE = {"BS": 512, "BC": 8, "num_warps": 8}  # splits and channels: few channels, so many multiprocessors read


@triton.jit
def _offsets(group, rows, channels, r, c):
    """Return int64 offsets of rows r and channels c of a group, and which of them exist."""
    at = (group.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    return at, (r < rows)[:, None] & (c < channels)[None, :]


@triton.jit
def _per_channel(ptr, c, channels):
    return tl.load(ptr + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def _shift(running_mean_ptr, c, channels):
    """Return the running mean; 0 where it is not finite, so that one overflow does not spoil all later batches."""
    mean = _per_channel(running_mean_ptr, c, channels)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def _normalize(centered, scale, bias):
    """Compute v without the residual, for forward and backward: an fma leaves the compiler no choice of rounding."""
    return tl.fma(centered, scale[None, :], bias[None, :])


@triton.jit
def _fold(tile, BM: tl.constexpr, BC: tl.constexpr):
    """Add rows of a tile [BM, BC] that one thread holds, down to [SUMS / BC, BC]: large tiles, few accumulators."""
    return tl.sum(tile.reshape(BM * BC // SUMS, SUMS // BC, BC), 0)


@triton.jit
def stats_kernel(
    x_ptr, running_mean_ptr, partial_ptr, rows, channels, rows_per_split, BM: tl.constexpr, BC: tl.constexpr
):
    """Write the split's sums of d and d^2, d = x - shift, to partial [2, G, S, C]; grid (columns, S, G)."""
    split, group = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    shift = _shift(running_mean_ptr, c, channels)
    total = tl.zeros([SUMS // BC, BC], tl.float32)
    square = tl.zeros([SUMS // BC, BC], tl.float32)
    for start in range(0, rows_per_split, BM):
        r = split * rows_per_split + start + tl.arange(0, BM)
        at, inside = _offsets(group, rows, channels, r, c)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, x - shift[None, :], 0.0)
        total += _fold(d, BM, BC)
        square += _fold(d * d, BM, BC)
    splits, groups = tl.num_programs(1), tl.num_programs(2)
    at = (group * splits + split) * channels + c
    tl.store(partial_ptr + at, tl.sum(total, 0), mask=c < channels)
    tl.store(partial_ptr + groups * splits * channels + at, tl.sum(square, 0), mask=c < channels)


@triton.jit
def _add_splits(partial_ptr, group, groups, splits, channels, c, BS: tl.constexpr, BC: tl.constexpr):
    """Return both sums of a group from partial [2, G, S, C], added in a fixed order."""
    first = tl.zeros([BS, BC], tl.float32)
    second = tl.zeros([BS, BC], tl.float32)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        at = (group * splits + s)[:, None] * channels + c[None, :]
        inside = (s < splits)[:, None] & (c < channels)[None, :]
        first += tl.load(partial_ptr + at, mask=inside, other=0.0)
        second += tl.load(partial_ptr + groups * splits * channels + at, mask=inside, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def join_kernel(
    partial_ptr,
    sums_ptr,
    first_ptr,
    second_ptr,
    channels,
    splits,
    count,
    GROUPS: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Write sums [2, G, C] and counts [G] in one buffer; where given, also both sums over groups [C]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first_total = tl.zeros([BC], tl.float32)
    second_total = tl.zeros([BC], tl.float32)
    for group in range(GROUPS):
        first, second = _add_splits(partial_ptr, group, GROUPS, splits, channels, c, BS, BC)
        tl.store(sums_ptr + group * channels + c, first, mask=c < channels)
        tl.store(sums_ptr + (GROUPS + group) * channels + c, second, mask=c < channels)
        first_total += first
        second_total += second
        if tl.program_id(0) == 0:
            tl.store(sums_ptr + 2 * GROUPS * channels + group, count)
    if first_ptr is not None:
        tl.store(first_ptr + c, first_total, mask=c < channels)
        tl.store(second_ptr + c, second_total, mask=c < channels)


@triton.jit
def finalize_kernel(
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    channels,
    splits,
    count,
    momentum,
    eps,
    GROUPS: tl.constexpr,
    COUNTED: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Write mean and rstd [G, C]; move running statistics group after group. COUNTED: counts [G] follow the sums."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    shift = _shift(running_mean_ptr, c, channels)
    running_mean = _per_channel(running_mean_ptr, c, channels)
    running_var = _per_channel(running_var_ptr, c, channels)
    for group in range(GROUPS):
        total, square = _add_splits(partial_ptr, group, GROUPS, splits, channels, c, BS, BC)
        if COUNTED:
            count = tl.load(partial_ptr + 2 * GROUPS * channels + group)
        offset = total / count
        variance = square / count - offset * offset
        variance = tl.where(variance < 0, 0.0, variance)
        mean = shift + offset
        tl.store(mean_ptr + group * channels + c, mean, mask=inside)
        tl.store(rstd_ptr + group * channels + c, 1.0 / tl.sqrt(variance + eps), mask=inside)
        running_mean = (1.0 - momentum) * running_mean + momentum * mean
        running_var = (1.0 - momentum) * running_var + momentum * variance * (count / (count - 1.0))
    tl.store(running_mean_ptr + c, running_mean, mask=inside)
    tl.store(running_var_ptr + c, running_var, mask=inside)
    if batches_ptr is not None and tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + GROUPS)


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
    """Write z, and where a mask is kept, a bit an element: 1 where the ReLU passed. Grid (tiles of a group, G).

    With an eps, which evaluation gives, rstd_ptr holds the variance.
    """
    group, columns = tl.program_id(1), tl.cdiv(channels, BC)
    r = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    column = tl.program_id(0) % columns
    c = column * BC + tl.arange(0, BC)
    at, inside = _offsets(group, rows, channels, r, c)
    mean = _per_channel(mean_ptr + group * channels, c, channels)
    rstd = _per_channel(rstd_ptr + group * channels, c, channels)
    if eps is not None:
        rstd = 1.0 / tl.sqrt(rstd + eps)
    weight = _per_channel(weight_ptr, c, channels)
    bias = _per_channel(bias_ptr, c, channels)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = _normalize(x - mean[None, :], rstd * weight, bias)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        bits = tl.where(v <= 0, 0, 1).reshape(BM, BC // 8, 8) << tl.arange(0, 8)[None, None, :]
        c8 = column * (BC // 8) + tl.arange(0, BC // 8)
        byte_at, byte_inside = _offsets(group, rows, tl.cdiv(channels, 8), r, c8)
        tl.store(mask_ptr + byte_at, tl.sum(bits, 2).to(tl.uint8), mask=byte_inside)
    if RELU:
        v = tl.where(v <= 0, 0.0, v)  # a NaN stays one, as in torch
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
    """Write the split's sums of g and g * xhat to partial [2, G, S, C], and g where asked; grid (columns, S, G).

    The ReLU's mask is computed from x (RELU), or read (mask_ptr), or there is none.
    """
    split, group = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c8 = tl.program_id(0) * (BC // 8) + tl.arange(0, BC // 8)
    mean = _per_channel(mean_ptr + group * channels, c, channels)
    rstd = _per_channel(rstd_ptr + group * channels, c, channels)
    weight = _per_channel(weight_ptr, c, channels)
    bias = _per_channel(bias_ptr, c, channels)
    total = tl.zeros([SUMS // BC, BC], tl.float32)
    product = tl.zeros([SUMS // BC, BC], tl.float32)
    for start in range(0, rows_per_split, BM):
        r = split * rows_per_split + start + tl.arange(0, BM)
        at, inside = _offsets(group, rows, channels, r, c)
        centered = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        g = tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if other_dz_ptr is not None:
            g += tl.load(other_dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(_normalize(centered, rstd * weight, bias) <= 0, 0.0, g)
        if mask_ptr is not None:
            byte_at, byte_inside = _offsets(group, rows, tl.cdiv(channels, 8), r, c8)
            byte = tl.load(mask_ptr + byte_at, mask=byte_inside, other=0).to(tl.int32)
            bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
            g = tl.where(bits.reshape(BM, BC) == 0, 0.0, g)
        if g_ptr is not None:
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=inside)
        total += _fold(g, BM, BC)
        product += _fold(g * centered, BM, BC)
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
    """Write dx; RELU: g_ptr holds dz, still to be masked. Grid (tiles of a group, G)."""
    group, groups, columns = tl.program_id(1), tl.num_programs(1), tl.cdiv(channels, BC)
    r = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    at, inside = _offsets(group, rows, channels, r, c)
    mean = _per_channel(mean_ptr + group * channels, c, channels)
    rstd = _per_channel(rstd_ptr + group * channels, c, channels)
    weight = _per_channel(weight_ptr, c, channels)
    per_count = 1.0 / tl.load(sums_ptr + 2 * groups * channels + group)
    g_mean = _per_channel(sums_ptr + group * channels, c, channels) * per_count
    product = _per_channel(sums_ptr + (groups + group) * channels, c, channels)
    slope = product * per_count * rstd
    centered = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = rstd * weight
    if RELU:
        bias = _per_channel(bias_ptr, c, channels)
        g = tl.where(_normalize(centered, scale, bias) <= 0, 0.0, g)
    dx = (g - g_mean[None, :] - centered * slope[None, :]) * scale[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@functools.cache
def _warn_of_copy(name: str) -> None:
    logging.getLogger(__name__).warning("batch norm copies %s to channels-last memory: slower", name)


def _channels_last(x: Tensor, name: str | None = None) -> Tensor:
    """Return x in the memory order [M, C]; of a copy under a name, warn once. Gradients of poolings come otherwise."""
    order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    if name is not None and not x.is_contiguous(memory_format=order):
        _warn_of_copy(name)
    return x.contiguous(memory_format=order)


def _block(channels: int) -> int:
    return min(max(int(triton.next_power_of_2(channels)), 8), WIDEST)


def _sum_launch(x: Tensor, groups: int, *, tile_bytes: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Split the rows of each group of x so that about PROGRAMS sum: grid (columns, S, G) and sizes."""
    channels = x.shape[1]
    rows = x.numel() // (channels * groups)
    bc = _block(channels)
    bm, columns = tile_bytes // x.element_size() // bc, triton.cdiv(channels, bc)
    wanted = max(PROGRAMS // (columns * groups), 1)
    rows_per_split = triton.cdiv(max(triton.cdiv(rows, wanted), SPLIT_TILES * bm), bm) * bm
    grid = (columns, max(triton.cdiv(rows, rows_per_split), 1), groups)
    return grid, {"rows": rows, "channels": channels, "rows_per_split": rows_per_split, "BM": bm, "BC": bc}


def _apply_launch(x: Tensor, groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Cover each group of x by tiles: grid (tiles, G) and sizes."""
    channels = x.shape[1]
    rows = x.numel() // (channels * groups)
    bc = _block(channels)
    bm = TILE_BYTES // x.element_size() // bc
    tiles = triton.cdiv(rows, bm) * triton.cdiv(channels, bc)
    return (tiles, groups), {"rows": rows, "channels": channels, "BM": bm, "BC": bc}


def _join(
    partial: Tensor, rows: int, *, totals: tuple[Tensor, Tensor] | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Add the splits of partial [2, G, S, C], then the ranks: sums [2, G, C] and counts [G] in one float32 buffer."""
    _, groups, splits, channels = partial.shape
    sums = partial.new_empty(2 * groups * channels + groups)
    first, second = totals or (None, None)
    grid = (triton.cdiv(channels, FINALIZE["BC"]),)
    join_kernel[grid](
        partial,
        sums,
        first,
        second,
        channels,
        splits,
        float(rows),
        GROUPS=groups,
        **FINALIZE,
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def _statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    *,
    views: int,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return mean and rstd [2, G, C], float32, and move the running statistics."""
    grid, sizes = _sum_launch(x, views, tile_bytes=STATS_TILE_BYTES)
    channels, rows = sizes["channels"], sizes["rows"]
    partial = x.new_empty((2, views, grid[1], channels), dtype=torch.float32)
    stats_kernel[grid](x, running_mean, partial, **sizes, num_warps=WARPS)
    splits = grid[1]
    if group is not None:
        partial, splits = _join(partial, rows, totals=None, group=group), 1
    statistics = x.new_empty((2, views, channels), dtype=torch.float32)
    finalize_kernel[(triton.cdiv(channels, FINALIZE["BC"]),)](
        partial,
        statistics[0],
        statistics[1],
        running_mean,
        running_var,
        num_batches_tracked,
        channels,
        splits,
        float(rows),
        momentum,
        eps,
        GROUPS=views,
        COUNTED=group is not None,
        **FINALIZE,
    )
    return statistics


def _apply(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool,
    views: int,
    keep_mask: bool,
    eps: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return z, and the ReLU's mask [M, C / 8] uint8 where it is kept; with an eps, rstd is the variance."""
    channels = x.shape[1]
    z = torch.empty_like(x)
    mask_shape = (x.numel() // channels, triton.cdiv(channels, 8))
    mask = x.new_empty(mask_shape, dtype=torch.uint8) if keep_mask else None
    grid, sizes = _apply_launch(x, views)
    apply_kernel[grid](x, residual, z, mask, mean, rstd, weight, bias, **sizes, eps=eps, RELU=relu, num_warps=WARPS)
    return z, mask


class _BatchNorm(torch.autograd.Function):
    """Batch norm with an optional residual; with one, z is returned twice. Once differentiable."""

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
        z, mask = _apply(x, residual, mean, rstd, weight, bias, relu=relu, views=len(mean), keep_mask=keep_mask)
        ctx.save_for_backward(x, mask, statistics, weight, bias)
        ctx.relu, ctx.group, ctx.residual_dtype = relu, group, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)  # an unused result has no gradient, and none is read
        return z if residual is None else (z, z.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, statistics, weight, bias = ctx.saved_tensors
        dz, other = (*(_channels_last(g) for g in grads if g is not None), None)[:2]
        assert dz is not None, "autograd asks for a backward only where a gradient arrives"
        mean, rstd = statistics
        views, channels = mean.shape
        has_residual = ctx.residual_dtype is not None
        g = torch.empty_like(x, dtype=ctx.residual_dtype) if has_residual else None
        recompute = ctx.relu and mask is None
        grid, sizes = _sum_launch(x, views, tile_bytes=TILE_BYTES)
        partial = statistics.new_empty(2, views, grid[1], channels)
        backward_sums_kernel[grid](
            dz, other, x, mask, g, mean, rstd, weight, bias, partial, **sizes, RELU=recompute, num_warps=WARPS
        )
        dbias, dweight = torch.empty_like(bias), torch.empty_like(weight)
        sums = _join(partial, sizes["rows"], totals=(dbias, dweight), group=ctx.group)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            tiles, sizes = _apply_launch(x, views)
            backward_apply_kernel[tiles](
                dz if g is None else g, x, dx, mean, rstd, weight, bias, sums, **sizes, RELU=recompute, num_warps=WARPS
            )
        return dx, g, dweight, dbias, None, None, None, None


def _batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    *,
    relu: bool,
    views: int,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Any:
    reference.check_views(x, weight, views=views, is_alone=group is None)
    x = _channels_last(x, "x")
    statistics = _statistics(
        x, running_mean, running_var, num_batches_tracked, views=views, momentum=momentum, eps=eps, group=group
    )
    keep_mask = residual is not None and torch.is_grad_enabled()
    return _BatchNorm.apply(x, residual, weight, bias, statistics, relu, keep_mask, group)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    *,
    relu: bool,
    views: int,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Normalise x with the batch statistics of each view, then ReLU where asked; see reference.batch_norm_act."""
    statistics = (running_mean, running_var, num_batches_tracked)
    options: dict[str, Any] = {"views": views, "momentum": momentum, "eps": eps, "group": group}
    if not runs_triton(x):
        return reference.batch_norm_act(x, weight, bias, *statistics, relu=relu, **options)
    z: Tensor = _batch_norm(x, None, weight, bias, *statistics, relu=relu, **options)
    return z


def batch_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    *,
    views: int,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return relu(batch norm + residual) twice, once for each consumer; see reference.batch_norm_add_relu.

    Both share memory. Either's gradient may be missing; two are added inside the backward kernel.
    """
    statistics = (running_mean, running_var, num_batches_tracked)
    options: dict[str, Any] = {"views": views, "momentum": momentum, "eps": eps, "group": group}
    if not runs_triton(x):
        return reference.batch_norm_add_relu(x, residual, weight, bias, *statistics, **options)
    reference.check_residual(x, residual)
    residual = _channels_last(residual, "residual")
    twins: tuple[Tensor, Tensor] = _batch_norm(x, residual, weight, bias, *statistics, relu=True, **options)
    return twins


def batch_norm_eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    relu: bool,
    eps: float,
) -> Tensor:
    """Normalise x with the running statistics, add the residual, ReLU; see reference.batch_norm_eval.

    One launch with one read and one write; plain torch where a gradient may be asked for, which evaluation seldom is.
    """
    if torch.is_grad_enabled() or not runs_triton(x):
        return reference.batch_norm_eval(x, residual, weight, bias, running_mean, running_var, relu=relu, eps=eps)
    reference.check_channels(x, weight)
    if residual is not None:
        reference.check_residual(x, residual)
        residual = _channels_last(residual, "residual")
    x = _channels_last(x, "x")
    z, _ = _apply(x, residual, running_mean, running_var, weight, bias, relu=relu, views=1, keep_mask=False, eps=eps)
    return z
