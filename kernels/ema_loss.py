"""BYOL's loss with its gradient, and the EMA update target <- tau*target + (1-tau)*p, in one launch.

The first programs process rows of q, z [2B, D], like `byol_loss`; each other program updates a block of a target, like
`lars_ema_`. The two parts do not interact, since z was computed from the targets before the launch. The parameters at
that time are those of this step, so the targets are exactly one step behind those that `lars_ema_` would give.

Bytes moved in addition to those of `byol_loss`: 8 read and 4 written per element of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels import reference
from fastbyol.kernels.byol_loss import WithGradient, add_if_last, launch_arguments, loss_of_rows
from fastbyol.kernels.dispatch import runs_triton
from fastbyol.kernels.lars_ema import follow
from fastbyol.kernels.segments import BLOCK, NUM_WARPS, PARAM, TARGET, Segments, block_of_segment, pointer


@triton.jit
def update_target(p_ptr, target_ptr, i, mask, tau):
    """Update a block of a target."""
    p = tl.load(p_ptr + i, mask=mask, other=0.0)
    target = tl.load(target_ptr + i, mask=mask, other=0.0)
    tl.store(target_ptr + i, follow(target, p, tau), mask=mask)


@triton.jit
def ema_loss_kernel(
    q_ptr,
    z_ptr,
    dq_ptr,
    partials_ptr,
    ticket_ptr,
    loss_ptr,
    pairs,
    width,
    q_stride,
    z_stride,
    programs,
    segments_ptr,
    segment_of_block_ptr,
    tau_ptr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute loss and dq in the first `programs` programs, and update a block of a target in each other one."""
    program = tl.program_id(0)
    if program < programs:
        loss_of_rows(q_ptr, z_ptr, dq_ptr, partials_ptr, program, pairs, width, q_stride, z_stride, ROWS, BLOCK_D)
        add_if_last(partials_ptr, ticket_ptr, loss_ptr, programs, CHUNK)
    else:
        block = program - programs
        _, row_ptr, start, count = block_of_segment(segments_ptr, segment_of_block_ptr, block, BLOCK)
        p_ptr = pointer(tl.load(row_ptr + PARAM), ALIGNED) + start
        target_ptr = pointer(tl.load(row_ptr + TARGET), ALIGNED) + start
        tau = tl.load(tau_ptr).to(tl.float64)
        i = tl.arange(0, BLOCK)
        if count == BLOCK:  # no mask, since a masked access is not wide
            update_target(p_ptr, target_ptr, i, i < BLOCK, tau)
        else:
            update_target(p_ptr, target_ptr, i, i < count, tau)


class Workspace:
    """Device memory shared by successive launches: the targets' addresses and the loss's ticket."""

    def __init__(self) -> None:
        self.segments = Segments()
        self.ticket: Tensor | None = None

    def update(self, targets: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        """Rebuild the tables if a tensor has moved."""
        if self.segments.update(params, momenta=[None] * len(params), targets=targets, groups=[0] * len(params)):
            self.ticket = torch.zeros(1, dtype=torch.int32, device=params[0].device)


def ema_loss(
    q: Tensor,
    z: Tensor,
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    tau: float | Tensor,
    workspace: Workspace | None = None,
) -> Tensor:
    """Compute byol_loss of q and z [2B, D] and move the targets, from which z was computed, towards params.

    tau: a scalar on the device, float32 or, for an exact 1-tau, float64, which a CUDA graph reads at every replay; a
    float costs an extra launch. workspace: one per list of tensors; None makes one for this call.
    """
    if not runs_triton(q):
        return reference.ema_loss(q, z, targets, params, tau=tau)
    workspace = Workspace() if workspace is None else workspace
    workspace.update(targets, params)
    segments, launch = workspace.segments, launch_arguments(q, z, ticket=workspace.ticket)
    ema_loss_kernel[(launch["programs"] + segments.blocks,)](
        **launch,
        segments_ptr=segments.table,
        segment_of_block_ptr=segments.segment_of_block,
        tau_ptr=tau if isinstance(tau, Tensor) else torch.full((), tau, dtype=torch.float64, device=q.device),
        ALIGNED=segments.is_aligned,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    torch.autograd.graph.increment_version(list(targets))  # tells autograd of the in-place update
    loss: Tensor = WithGradient.apply(q, launch["loss_ptr"], launch["dq_ptr"])
    return loss
