"""One LARS step with the EMA target update over all tensors, in three launches for any number of tensors.

    g <- g + wd*p;  ratio = trust*|p|/|g|, 1 where either norm is 0 or trust is None
    u <- momentum*u + ratio*g;  p <- p - lr*u;  target <- target + (1-tau)*(p - target)

norms   one program per block of a tensor: partial sums of p^2 and g^2 ratios  one program per tensor: adds its partial
sums in a fixed order, computes its ratio, and sets the skip flag if |g|
        is not finite
sweep   one program per block: updates momentum, parameter and target, or nothing if the skip flag is set

Bytes moved per element, float32: norms read 8; the sweep reads 16 and writes 12, or 12 and 8 without a target.

The tensors stay ordinary tensors, addressed as segments. Rates and the addresses of gradients, which change from step
to step, are written to the device in stream order, so that the host never waits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels import reference
from fastbyol.kernels.dispatch import runs_triton
from fastbyol.kernels.reference import LarsGroup, LarsRates
from fastbyol.kernels.segments import (
    BLOCK,
    COLUMNS,
    FIRST_BLOCK,
    GROUP,
    MOMENTUM,
    NUM_WARPS,
    NUMEL,
    PARAM,
    TARGET,
    DeviceTable,
    Segments,
    block_of_segment,
    extents,
    is_capturing,
    pointer,
)

CHUNK = 1024  # partial sums that a program of `ratios` adds at a time
RATIO_WARPS = 4

# Columns of the table of rates, one row of float64 per group, in the order of LarsRates; trust is NaN for None.
# Float64, because 1 - tau loses most digits for a float32 tau near 1.
LR = tl.constexpr(0)
INERTIA = tl.constexpr(1)
WEIGHT_DECAY = tl.constexpr(2)
TRUST = tl.constexpr(3)
TAU = tl.constexpr(4)
RATES = tl.constexpr(5)


@triton.jit
def rate(rates_ptr, row_ptr, COLUMN: tl.constexpr):
    """Load a rate of a segment's group as float32."""
    return tl.load(rates_ptr + tl.load(row_ptr + GROUP) * RATES + COLUMN).to(tl.float32)


@triton.jit
def follow(target, p, tau):
    """Move a target towards p with float64 tau; the result is exactly p at tau = 0 and exactly the target at 1."""
    step = (1.0 - tau).to(tl.float32)
    return tl.where(step < 0.5, target + step * (p - target), p - tau.to(tl.float32) * (p - target))


@triton.jit
def lars_norms_kernel(
    segments_ptr,
    grads_ptr,
    segment_of_block_ptr,
    rates_ptr,
    partials_ptr,
    is_skipped_ptr,
    blocks,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sums of squares of each block to partials [2, blocks] and clear the skip flag."""
    block = tl.program_id(0)
    segment, row_ptr, start, count = block_of_segment(segments_ptr, segment_of_block_ptr, block, BLOCK)
    decay = rate(rates_ptr, row_ptr, WEIGHT_DECAY)
    p_ptr = pointer(tl.load(row_ptr + PARAM), ALIGNED) + start
    g_ptr = pointer(tl.load(grads_ptr + segment), ALIGNED) + start
    i = tl.arange(0, BLOCK)
    if count == BLOCK:  # no mask, since a masked access is not wide
        p = tl.load(p_ptr + i)
        g = tl.load(g_ptr + i)
    else:
        p = tl.load(p_ptr + i, mask=i < count, other=0.0)
        g = tl.load(g_ptr + i, mask=i < count, other=0.0)
    g += decay * p
    tl.store(partials_ptr + block, tl.sum(p * p, 0))
    tl.store(partials_ptr + blocks + block, tl.sum(g * g, 0))
    if block == 0:
        tl.store(is_skipped_ptr, 0)


@triton.jit
def lars_ratios_kernel(
    segments_ptr,
    rates_ptr,
    partials_ptr,
    ratios_ptr,
    is_skipped_ptr,
    blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute the ratio of each segment; set the skip flag if its gradient's norm is inf or NaN."""
    segment = tl.program_id(0)
    row_ptr = segments_ptr + segment * COLUMNS
    first = tl.load(row_ptr + FIRST_BLOCK)
    end = first + tl.cdiv(tl.load(row_ptr + NUMEL), BLOCK)
    p_square = tl.zeros([CHUNK], tl.float32)
    g_square = tl.zeros([CHUNK], tl.float32)
    for start in range(first, end, CHUNK):
        i = start + tl.arange(0, CHUNK)
        p_square += tl.load(partials_ptr + i, mask=i < end, other=0.0)
        g_square += tl.load(partials_ptr + blocks + i, mask=i < end, other=0.0)
    p_norm = tl.sqrt(tl.sum(p_square, 0))
    g_norm = tl.sqrt(tl.sum(g_square, 0))
    trust = rate(rates_ptr, row_ptr, TRUST)
    adapts = (trust == trust) & (p_norm > 0) & (g_norm > 0)  # noqa: PLR0124  # NaN is None
    tl.store(ratios_ptr + segment, tl.where(adapts, trust * p_norm / tl.where(adapts, g_norm, 1.0), 1.0))
    if not (g_norm < float("inf")):  # true for NaN too; all programs that write, write 1
        tl.store(is_skipped_ptr, 1)


@triton.jit
def update(p_ptr, g_ptr, momentum_ptr, target_ptr, i, count, target_count, ratio, decay, inertia, lr, tau):
    """Update a block of momentum, parameter and target; target_count is 0 without a target."""
    mask, target_mask = i < count, i < target_count
    p = tl.load(p_ptr + i, mask=mask, other=0.0)
    g = tl.load(g_ptr + i, mask=mask, other=0.0) + decay * p
    momentum = inertia * tl.load(momentum_ptr + i, mask=mask, other=0.0) + ratio * g
    target = tl.load(target_ptr + i, mask=target_mask, other=0.0)
    p -= lr * momentum
    tl.store(momentum_ptr + i, momentum, mask=mask)
    tl.store(p_ptr + i, p, mask=mask)
    tl.store(target_ptr + i, follow(target, p, tau), mask=target_mask)


@triton.jit
def lars_sweep_kernel(
    segments_ptr,
    grads_ptr,
    segment_of_block_ptr,
    rates_ptr,
    ratios_ptr,
    is_skipped_ptr,
    skipped_ptr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update every block unless the step is skipped; count the skipped steps, in total and in a row."""
    block = tl.program_id(0)
    is_skipped = tl.load(is_skipped_ptr)
    if block == 0:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + is_skipped)
        tl.store(skipped_ptr + 1, tl.where(is_skipped != 0, tl.load(skipped_ptr + 1) + 1, 0))
    if is_skipped == 0:
        segment, row_ptr, start, count = block_of_segment(segments_ptr, segment_of_block_ptr, block, BLOCK)
        p_ptr = pointer(tl.load(row_ptr + PARAM), ALIGNED) + start
        g_ptr = pointer(tl.load(grads_ptr + segment), ALIGNED) + start
        momentum_ptr = pointer(tl.load(row_ptr + MOMENTUM), ALIGNED) + start
        target_address = tl.load(row_ptr + TARGET)
        target_ptr = pointer(target_address, ALIGNED) + start
        has_target = target_address != 0
        ratio = tl.load(ratios_ptr + segment)
        decay = rate(rates_ptr, row_ptr, WEIGHT_DECAY)
        inertia = rate(rates_ptr, row_ptr, INERTIA)
        lr = rate(rates_ptr, row_ptr, LR)
        tau = tl.load(rates_ptr + tl.load(row_ptr + GROUP) * RATES + TAU)
        i = tl.arange(0, BLOCK)
        if count == BLOCK:
            target_count = tl.where(has_target, BLOCK, 0)
            update(p_ptr, g_ptr, momentum_ptr, target_ptr, i, BLOCK, target_count, ratio, decay, inertia, lr, tau)
        else:
            target_count = tl.where(has_target, count, 0)
            update(p_ptr, g_ptr, momentum_ptr, target_ptr, i, count, target_count, ratio, decay, inertia, lr, tau)


class Workspace:
    """Device memory shared by the launches of successive steps; never part of a checkpoint."""

    rates: DeviceTable  # created by the first set_rates; those below by the first update
    grads: DeviceTable
    partials: Tensor
    ratios: Tensor
    is_skipped: Tensor

    def __init__(self) -> None:
        self.segments = Segments()
        self._rates: Sequence[LarsRates] = ()
        self._logged: set[str] = set()

    def set_rates(self, rates: Sequence[LarsRates], device: torch.device) -> None:
        """Write the rates of each group to the device if they have changed.

        Does nothing during a capture: at each replay a graph reads the rates that were last written before it.
        """
        if is_capturing(device):
            return
        if len(rates) != len(self._rates) or self.rates.tensor.device != device:
            self.rates = DeviceTable((len(rates), len(LarsRates._fields)), torch.float64, device)
        elif rates == self._rates:
            return
        self.rates.write([[math.nan if x is None else x for x in row] for row in rates])
        self._rates = rates

    @property
    def tau(self) -> Tensor:
        """The EMA rate of the first group, a float64 scalar on the device."""
        return self.rates.tensor[0, TAU.value]

    def update(self, groups: Sequence[LarsGroup]) -> tuple[list[Tensor], bool]:
        """Update tables and rates; return the gradients in their parameters' layout, and whether all is aligned.

        The gradients must stay alive until the launches that read them are queued.
        """
        params = [p for group in groups for p in group.params]
        device = params[0].device
        if self.segments.update(
            params,
            momenta=[x for group in groups for x in group.momenta],
            targets=[x for group in groups for x in group.targets],
            groups=[i for i, group in enumerate(groups) for _ in group.params],
        ):
            self.grads = DeviceTable((len(params),), torch.int64, device)
            self.partials = torch.empty(2 * self.segments.blocks, dtype=torch.float32, device=device)
            self.ratios = torch.empty(len(params), dtype=torch.float32, device=device)
            self.is_skipped = torch.empty(1, dtype=torch.int32, device=device)
        self.set_rates([group.rates for group in groups], device)
        grads = [
            self._in_layout_of(g, p) for p, g in zip(params, chain(*(group.grads for group in groups)), strict=True)
        ]
        addresses = [g.data_ptr() for g in grads]
        self.grads.write(addresses)
        is_aligned = self.segments.is_aligned and all(address % 16 == 0 for address in addresses)
        if not is_aligned:
            self._log_once(
                "some tensors do not start at a multiple of 16 bytes: LARS reads 4 bytes at a time instead of 16"
            )
        return grads, is_aligned

    def _in_layout_of(self, g: Tensor, p: Tensor) -> Tensor:
        if g.dtype == p.dtype and (g.stride() == p.stride() or extents(g) == extents(p)):
            return g
        self._log_once(
            "some gradients have another memory layout than their parameters: LARS copies them at every step"
        )
        return torch.empty_like(p).copy_(g)

    def _log_once(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logging.getLogger(__name__).warning(reason)


def lars_ema_(groups: Sequence[LarsGroup], *, skipped: Tensor, workspace: Workspace) -> None:
    """Take one LARS step and update the targets, or skip both if the norm of any gradient is inf or NaN.

    skipped: [2] int32, counts the skipped steps, in total and in a row. There is no host sync. workspace: one per list
    of tensors. In a CUDA graph the rates are those of the last `workspace.set_rates` before a replay, not of `groups`.
    """
    if not runs_triton(groups[0].params[0]):
        reference.lars_ema_(groups, skipped=skipped)
        return
    grads, is_aligned = workspace.update(groups)
    segments, rates = workspace.segments, workspace.rates.tensor
    addresses = (segments.table, workspace.grads.tensor, segments.segment_of_block, rates)
    whole = {"ALIGNED": is_aligned, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    lars_norms_kernel[(segments.blocks,)](
        *addresses, workspace.partials, workspace.is_skipped, segments.blocks, **whole
    )
    lars_ratios_kernel[(len(grads),)](
        segments.table,
        rates,
        workspace.partials,
        workspace.ratios,
        workspace.is_skipped,
        segments.blocks,
        BLOCK=BLOCK,
        CHUNK=CHUNK,
        num_warps=RATIO_WARPS,
    )
    lars_sweep_kernel[(segments.blocks,)](*addresses, workspace.ratios, workspace.is_skipped, skipped, **whole)
    # tells autograd of the in-place updates, as torch's own operations do
    changed = [x for group in groups for x in chain(group.params, group.momenta, group.targets) if x is not None]
    torch.autograd.graph.increment_version(changed)
