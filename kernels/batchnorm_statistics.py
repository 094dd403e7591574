"""Batch norm's sums over rows per view and channel, and the statistics computed from them.

x is treated as G groups (views) of R rows of C channels. Every program sums a split of a group's rows; then the splits
are added in a fixed order, so that results are the same in every run. The sums are of d = x - shift, with the running
mean as shift, so that E[d^2] - E[d]^2 does not cancel:

    mean = shift + E[d],  rstd = rsqrt(E[d^2] - E[d]^2 + eps)                              [G, C], float32
    running mean, var  <-  (1 - momentum) * running + momentum * (mean, variance * n / (n - 1)), view after view

A channel whose running statistics would become inf or NaN keeps the old ones, so that one overflow, which the
optimiser skips, does not spoil all later batches and the exported encoder.

Elements moved: x is read once; partial sums are a small part. With a process group, one all-reduce adds the sums and
counts of all ranks. The shift must be equal on all ranks, which holds if the running statistics started equal.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels.reference import NormParams

WARPS = 4
WIDEST = 64  # channels per tile: whole 128-byte lines of bf16; wider tiles exchange weights through shared memory
STATS_TILE_BYTES = 8192  # of x per program where only x is read: as many bytes in flight as in the other kernels
SUMS = tl.constexpr(1024)  # accumulators per sum and program, 8 per thread
SPLIT_TILES = 4  # at least this many tiles per program, so that partial sums are a small part of the bytes
# Programs that sum at the same time: 6 blocks of 128 threads on each of 128 multiprocessors. This many fit on sm_90,
# with up to 80 registers; on sm_80 the backward's sums take up to 91, and 5 blocks fit. Of the sums of
# batchnorm_pool.py 3 fit, which makes two rounds.
PROGRAMS = 768
# Splits and channels: few channels per program, so that many multiprocessors read.
FINALIZE = {"BS": 512, "BC": 8, "num_warps": 8}


@triton.jit
def offsets(group, rows, channels, r, c):
    """Return int64 offsets of rows r and channels c of a group, and a mask of those that exist."""
    at = (group.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    return at, (r < rows)[:, None] & (c < channels)[None, :]


@triton.jit
def per_channel(ptr, c, channels):
    """Load float32 values of channels c."""
    return tl.load(ptr + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def fold(tile, BM: tl.constexpr, BC: tl.constexpr):
    """Sum the rows of a tile [BM, BC] within each thread to [SUMS / BC, BC]: large tiles with few accumulators."""
    return tl.sum(tile.reshape(BM * BC // SUMS, SUMS // BC, BC), 0)


@triton.jit
def stats_kernel(
    x_ptr, running_mean_ptr, partial_ptr, rows, channels, rows_per_split, BM: tl.constexpr, BC: tl.constexpr
):
    """Write the split's sums of d and d^2, d = x - shift, to partial [2, G, S, C]; grid (columns, S, G)."""
    split, group = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    shift = per_channel(running_mean_ptr, c, channels)
    total = tl.zeros([SUMS // BC, BC], tl.float32)
    square = tl.zeros([SUMS // BC, BC], tl.float32)
    for start in range(0, rows_per_split, BM):
        r = split * rows_per_split + start + tl.arange(0, BM)
        at, inside = offsets(group, rows, channels, r, c)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, x - shift[None, :], 0.0)
        total += fold(d, BM, BC)
        square += fold(d * d, BM, BC)
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
    """Write sums [2, G, C] and counts [G] to one buffer and, if given, both sums over groups [C]."""
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
    """Write mean and rstd [G, C]; update running statistics group after group, where they stay finite.

    COUNTED: the sums are followed by counts [G].
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    shift = per_channel(running_mean_ptr, c, channels)
    running_mean = shift
    running_var = per_channel(running_var_ptr, c, channels)
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
    # comparisons with NaN are false
    is_finite = (tl.abs(running_mean) < float("inf")) & (tl.abs(running_var) < float("inf"))
    tl.store(running_mean_ptr + c, running_mean, mask=inside & is_finite)
    tl.store(running_var_ptr + c, running_var, mask=inside & is_finite)
    if batches_ptr is not None and tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + GROUPS)


def column_block(channels: int) -> int:
    """Return the number of channels per tile."""
    return min(max(int(triton.next_power_of_2(channels)), 8), WIDEST)


def sum_launch(x: Tensor, groups: int, *, tile_bytes: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid (columns, S, G) and sizes that split each group's rows among about PROGRAMS programs."""
    channels = x.shape[1]
    rows = x.numel() // (channels * groups)
    bc = column_block(channels)
    bm, columns = tile_bytes // x.element_size() // bc, triton.cdiv(channels, bc)
    wanted = max(PROGRAMS // (columns * groups), 1)
    rows_per_split = triton.cdiv(max(triton.cdiv(rows, wanted), SPLIT_TILES * bm), bm) * bm
    grid = (columns, max(triton.cdiv(rows, rows_per_split), 1), groups)
    return grid, {"rows": rows, "channels": channels, "rows_per_split": rows_per_split, "BM": bm, "BC": bc}


def reduce_splits(
    partial: Tensor, rows: int, *, totals: tuple[Tensor, Tensor] | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Sum partial [2, G, S, C] over splits and ranks: sums [2, G, C] and counts [G] in one float32 buffer.

    totals: two tensors [C] for this rank's sums over groups, or None.
    """
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


def batch_statistics(x: Tensor, norm: NormParams) -> Tensor:
    """Return mean and rstd in one float32 tensor [2, G, C] and update the running statistics."""
    grid, sizes = sum_launch(x, norm.views, tile_bytes=STATS_TILE_BYTES)
    partial = x.new_empty((2, norm.views, grid[1], sizes["channels"]), dtype=torch.float32)
    stats_kernel[grid](x, norm.running_mean, partial, **sizes, num_warps=WARPS)
    return finish(partial, sizes["rows"], norm)


def finish(partial: Tensor, rows: int, norm: NormParams) -> Tensor:
    """Return mean and rstd [2, G, C] from partial sums [2, G, S, C] of so many rows; update the running statistics."""
    _, views, splits, channels = partial.shape
    if norm.group is not None:
        partial, splits = reduce_splits(partial, rows, totals=None, group=norm.group), 1
    statistics = partial.new_empty(2, views, channels)
    finalize_kernel[(triton.cdiv(channels, FINALIZE["BC"]),)](
        partial,
        statistics[0],
        statistics[1],
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        channels,
        splits,
        float(rows),
        norm.momentum,
        norm.eps,
        GROUPS=views,
        COUNTED=norm.group is not None,
        **FINALIZE,
    )
    return statistics
