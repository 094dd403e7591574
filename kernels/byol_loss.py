"""BYOL's loss and its gradient in one launch: q, z [2B, D], view-major; row i of q is compared with row i +- B of z.

Per row, in float32, with n(x) = x * rsqrt(max(sum(x^2), 1e-12)):

    d = n(q) - n(z),  loss = sum(d^2) / B over all rows
    dq = rsqrt(|q|^2) * (2/B) * (d - n(q) * (n(q) . d)), without the last term where |q|^2 is under 1e-12

Bytes moved per element in bfloat16: 2 read of q, 2 read of z, 2 written of dq. The backward multiplies dq by the
gradient of the loss, which stays on the device.

Every program writes the loss of its rows and takes a ticket. The program that takes the last ticket adds the losses in
a fixed order, so that the loss has the same bits in every run, and resets the ticket to 0 for the next launch or the
next replay of a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels import reference
from fastbyol.kernels.dispatch import runs_triton

NORM_EPS = tl.constexpr(reference.NORM_EPS)
NUM_WARPS = 8
TILE = 2048  # elements of q per program: 8 per thread, one 128-bit access in bfloat16
CHUNK = 1024  # partial losses that the last program adds at a time


@triton.jit
def loss_of_rows(
    q_ptr,
    z_ptr,
    dq_ptr,
    partials_ptr,
    program,
    pairs,
    width,
    q_stride,
    z_stride,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write dq of a program's rows and their part of the loss."""
    row = program * ROWS + tl.arange(0, ROWS)
    other = tl.where(row < pairs, row + pairs, row - pairs)
    column = tl.arange(0, BLOCK_D)
    mask = (row < 2 * pairs)[:, None] & (column < width)[None, :]
    row = row.to(tl.int64)[:, None]
    other = other.to(tl.int64)[:, None]
    q = tl.load(q_ptr + row * q_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + other * z_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    q_square = tl.sum(q * q, 1)
    q_scale = tl.rsqrt(tl.maximum(q_square, NORM_EPS))[:, None]
    z_scale = tl.rsqrt(tl.maximum(tl.sum(z * z, 1), NORM_EPS))[:, None]
    unit = q * q_scale
    difference = unit - z * z_scale
    along = tl.where(q_square < NORM_EPS, 0.0, tl.sum(unit * difference, 1))  # the clamp has no gradient
    dq = (difference - unit * along[:, None]) * q_scale * (2.0 / pairs)
    tl.store(dq_ptr + row * width + column[None, :], dq, mask=mask)
    tl.store(partials_ptr + program, tl.sum(tl.sum(difference * difference, 1), 0) / pairs)


@triton.jit
def add_if_last(partials_ptr, ticket_ptr, loss_ptr, programs, CHUNK: tl.constexpr):
    """In the last program to arrive, add up the partial losses and reset the ticket."""
    # The release of the ticket publishes the partial loss; its acquire shows the last program those of the others.
    # The barrier orders the other threads of this program before the one that takes the ticket.
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
        total = tl.zeros([CHUNK], tl.float32)
        for start in range(0, programs, CHUNK):
            i = start + tl.arange(0, CHUNK)
            total += tl.load(partials_ptr + i, mask=i < programs, other=0.0, cache_modifier=".cg")  # past L1
        tl.store(loss_ptr, tl.sum(total, 0))
        tl.store(ticket_ptr, 0)


@triton.jit
def byol_loss_kernel(
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
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute loss and dq, ROWS rows per program."""
    loss_of_rows(q_ptr, z_ptr, dq_ptr, partials_ptr, tl.program_id(0), pairs, width, q_stride, z_stride, ROWS, BLOCK_D)
    add_if_last(partials_ptr, ticket_ptr, loss_ptr, programs, CHUNK)


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x [N, D], copied if the elements of a row are not adjacent in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def launch_arguments(
    q: Tensor, z: Tensor, *, ticket: Tensor | None, tile: int = TILE, chunk: int = CHUNK
) -> dict[str, Any]:
    """Return the arguments of a launch on q and z: inputs, new outputs and sizes.

    Raises ValueError where q and z are no pair of view-major projections.
    """
    if q.ndim != 2 or q.shape != z.shape or q.shape[0] % 2:
        raise ValueError(f"the loss got q {list(q.shape)} and z {list(z.shape)}; give both as [2B, D], view after view")
    q, z = rows_contiguous(q.detach()), rows_contiguous(z.detach())
    block_d = triton.next_power_of_2(q.shape[1])
    rows = max(1, tile // block_d)
    programs = triton.cdiv(q.shape[0], rows)
    return {
        "q_ptr": q,
        "z_ptr": z,
        # an element of dq is about 1/(B*sqrt(D)*|q|), too small for float16: the loss scale comes only in the backward
        "dq_ptr": torch.empty(q.shape, dtype=torch.float32 if q.dtype == torch.float16 else q.dtype, device=q.device),
        "partials_ptr": torch.empty(programs, dtype=torch.float32, device=q.device),
        "ticket_ptr": torch.zeros(1, dtype=torch.int32, device=q.device) if ticket is None else ticket,
        "loss_ptr": torch.empty((), dtype=torch.float32, device=q.device),
        "pairs": q.shape[0] // 2,
        "width": q.shape[1],
        "q_stride": q.stride(0),
        "z_stride": z.stride(0),
        "programs": programs,
        "ROWS": rows,
        "BLOCK_D": block_d,
        "CHUNK": chunk,
    }


class WithGradient(torch.autograd.Function):
    """An autograd function that returns a loss whose gradient for q, at an upstream gradient of 1, is dq."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, loss: Tensor, dq: Tensor) -> Tensor:
        """Save dq for the backward."""
        ctx.save_for_backward(dq)
        ctx.dtype = q.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Multiply dq by the upstream gradient, on the device."""
        (dq,) = ctx.saved_tensors
        return (dq * upstream).to(ctx.dtype), None, None


def byol_loss(q: Tensor, z: Tensor, *, ticket: Tensor | None = None) -> Tensor:
    """Compute BYOL's loss, the sum of both directions averaged over images, in [0, 8]; float32.

    q, z [2B, D]: online predictions and target projections, view-major, of any float dtype; z gets no gradient.
    ticket: [1] int32, 0 before and after; one tensor serves all launches that follow each other on a stream. None makes
    a new one, which costs a launch to clear it.
    """
    if not runs_triton(q):
        return reference.byol_loss(q, z)
    launch = launch_arguments(q, z, ticket=ticket)
    byol_loss_kernel[(launch["programs"],)](**launch, num_warps=NUM_WARPS)
    loss: Tensor = WithGradient.apply(q, launch["loss_ptr"], launch["dq_ptr"])
    return loss
