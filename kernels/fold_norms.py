"""Batch norms in evaluation folded into the convolutions before them, those of a whole network in one launch.

    scale = gamma rsqrt(var + eps)        per output channel
    folded weight = weight scale          in the precision that the convolution computes in
    folded bias = beta - mean scale       plus the same of a shortcut's batch norm, whose sum the convolution takes

Bytes moved per weight: 4 read, 2 written in bfloat16; 0.14 GB for a ResNet-50.

Every convolution is a segment of blocks of BLOCK weights, one program per block, as in segments.py. Channels are the
outermost dimension of the weights in memory, so that an offset over the weights of a channel is the channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels import reference
from fastbyol.kernels.dispatch import runs_triton
from fastbyol.kernels.reference import Fold, Folded, NormParams
from fastbyol.kernels.segments import BLOCK, NUM_WARPS, is_capturing, is_dense, pointer, upload

ALIGNMENT = 64  # elements, 128 bytes or more: where a folded weight or bias may start

# Columns of the table, one row of int64 per convolution: addresses of weight, norm and shortcut's norm (0 for none);
# where the folded weight and bias start, in elements; the number of weights, of those per channel, and the first block.
WEIGHT = tl.constexpr(0)
NORM = tl.constexpr(1)
SHORTCUT = tl.constexpr(5)
FOLDED = tl.constexpr(9)
BIAS = tl.constexpr(10)
NUMEL = tl.constexpr(11)
PER_CHANNEL = tl.constexpr(12)
FIRST_BLOCK = tl.constexpr(13)
COLUMNS = tl.constexpr(14)


@triton.jit
def _scale_and_shift(norm_ptr, channel, is_first, exists, eps):
    """Return the scale of each channel that exists and, where is_first, its shift; else 0."""
    gamma = tl.load(pointer(tl.load(norm_ptr), False) + channel, mask=exists, other=0.0)
    var = tl.load(pointer(tl.load(norm_ptr + 3), False) + channel, mask=exists, other=1.0)
    scale = gamma * tl.rsqrt(var + eps)
    beta = tl.load(pointer(tl.load(norm_ptr + 1), False) + channel, mask=is_first, other=0.0)
    mean = tl.load(pointer(tl.load(norm_ptr + 2), False) + channel, mask=is_first, other=0.0)
    return scale, tl.where(is_first, beta - mean * scale, 0.0)


@triton.jit
def _fold_block(row_ptr, folded_ptr, start, i, count, eps, ALIGNED: tl.constexpr):
    """Fold `count` weights from `start`; the first weight of a channel brings its bias along."""
    exists = i < count
    per_channel = tl.load(row_ptr + PER_CHANNEL).to(tl.int32)
    channel = (start + i) // per_channel
    is_first = exists & ((start + i) % per_channel == 0)
    scale, bias = _scale_and_shift(row_ptr + NORM, channel, is_first, exists, eps)
    weight = tl.load(pointer(tl.load(row_ptr + WEIGHT), ALIGNED) + start + i, mask=exists, other=0.0)
    to_ptr = folded_ptr + tl.multiple_of(tl.load(row_ptr + FOLDED), 16) + start
    tl.store(to_ptr + i, (weight * scale).to(folded_ptr.dtype.element_ty), mask=exists)
    if tl.load(row_ptr + SHORTCUT) != 0:
        bias += _scale_and_shift(row_ptr + SHORTCUT, channel, is_first, is_first, eps)[1]
    tl.store(folded_ptr + tl.load(row_ptr + BIAS) + channel, bias.to(folded_ptr.dtype.element_ty), mask=is_first)


@triton.jit
def fold_norms_kernel(
    table_ptr,  # [S, COLUMNS]
    segment_of_block_ptr,
    folded_ptr,  # all weights and biases
    eps,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold a block of weights, and the biases of the channels that begin in it; grid (blocks,)."""
    block = tl.program_id(0)
    row_ptr = table_ptr + tl.load(segment_of_block_ptr + block) * COLUMNS
    start = ((block - tl.load(row_ptr + FIRST_BLOCK)) * BLOCK).to(tl.int32)
    start = tl.multiple_of(start, 16)
    count = tl.minimum(tl.load(row_ptr + NUMEL).to(tl.int32) - start, BLOCK)
    i = tl.arange(0, BLOCK)
    if count == BLOCK:  # no mask, since a masked access is not wide
        _fold_block(row_ptr, folded_ptr, start, i, BLOCK, eps, ALIGNED)
    else:
        _fold_block(row_ptr, folded_ptr, start, i, count, eps, ALIGNED)


class Workspace:
    """Device memory of the folded weights and of the table of addresses; never part of a checkpoint."""

    folded: list[Folded]
    table: Tensor
    segment_of_block: Tensor
    memory: Tensor
    is_aligned: bool

    def __init__(self) -> None:
        self._key: tuple[torch.dtype, list[int]] | None = None

    def update(self, folds: Sequence[Fold], *, dtype: torch.dtype) -> None:
        """Rebuild tables and memory if a tensor has moved; raise RuntimeError if that happens in a capture."""
        addresses = [_addresses(fold) for fold in folds]
        key = dtype, [address for row in addresses for address in row]
        if key == self._key:
            return
        device = folds[0].weight.device
        if is_capturing(device):
            raise RuntimeError("a weight or a statistic has moved; take one eager step before the capture")
        for fold in folds:
            _check(fold)
        sizes = [size for weight, _, _ in folds for size in (weight.numel(), len(weight))]
        starts = list(accumulate((triton.cdiv(size, ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        self.memory = torch.empty(starts[-1], dtype=dtype, device=device)
        blocks = [triton.cdiv(weight.numel(), BLOCK) for weight, _, _ in folds]
        first = accumulate(blocks, initial=0)
        self.folded, rows = [], []
        for number, (weight, _, _) in enumerate(folds):
            to, bias = starts[2 * number : 2 * number + 2]
            view = self.memory.as_strided(weight.shape, weight.stride(), to)
            self.folded.append(Folded(view, self.memory[bias : bias + len(weight)]))
            rows.append([*addresses[number], to, bias, weight.numel(), weight[0].numel(), next(first)])
        self.table = upload(torch.tensor(rows), device)
        self.segment_of_block = upload(torch.arange(len(folds)).repeat_interleave(torch.tensor(blocks)).int(), device)
        self.is_aligned = all(row[WEIGHT.value] % 16 == 0 for row in addresses)
        self._key = key


def _addresses(fold: Fold) -> list[int]:
    """Return the addresses of a convolution's columns WEIGHT, NORM and SHORTCUT."""
    norms = (fold.norm, fold.shortcut)
    return [fold.weight.data_ptr(), *(x for norm in norms for x in (_of_norm(norm) if norm is not None else [0] * 4))]


def _of_norm(norm: NormParams) -> list[int]:
    return [x.data_ptr() for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]


def _check(fold: Fold) -> None:
    """Raise ValueError for tensors of another dtype, device or memory layout than the kernel reads."""
    weight = fold.weight
    norms = [fold.norm] if fold.shortcut is None else [fold.norm, fold.shortcut]
    params = [x for norm in norms for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    if not is_dense(weight) or (len(weight) > 1 and weight.stride(0) != weight[0].numel()):
        raise ValueError(
            f"a convolution's weight has shape {list(weight.shape)} and strides {list(weight.stride())}; give "
            "contiguous or channels-last memory"
        )
    if any(x.dtype != torch.float32 or x.device != weight.device for x in (weight, *params)):
        raise ValueError("a convolution and its batch norm differ in device or are not float32; make them so")
    if any(len(x) != len(weight) or not x.is_contiguous() for x in params):
        raise ValueError(f"a batch norm has not the {len(weight)} channels of its convolution, one after the other")


def fold_norms(folds: Sequence[Fold], *, dtype: torch.dtype, workspace: Workspace) -> list[Folded]:
    """Fold batch norms on running statistics into the convolutions before them; see reference.fold_norms.

    One launch and no host sync. workspace: one per list of convolutions; the results lie in it, at the same addresses
    until a tensor moves, and the next call writes them again. All norms have one eps.
    """
    if not runs_triton(folds[0].weight):
        return reference.fold_norms(folds, dtype=dtype)
    workspace.update(folds, dtype=dtype)
    fold_norms_kernel[(len(workspace.segment_of_block),)](
        workspace.table,
        workspace.segment_of_block,
        workspace.memory,
        folds[0].norm.eps,
        ALIGNED=workspace.is_aligned,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return workspace.folded
