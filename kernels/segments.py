"""Device tables that let one launch process any number of tensors: their addresses, and the tensor of each block.

Every tensor is a segment of blocks of BLOCK elements, one program per block. The tensors must be dense, in any order of
their dimensions, and a parameter, its momentum and its target must have the same memory layout, so that an offset is
the same element in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 8
BLOCK = 128 * NUM_WARPS * 2  # elements: 8 per thread and tensor, two 128-bit accesses

# Columns of the table of segments, one row of int64 per tensor: addresses (0 for none), elements, group, first block.
PARAM = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
TARGET = tl.constexpr(2)
NUMEL = tl.constexpr(3)
GROUP = tl.constexpr(4)
FIRST_BLOCK = tl.constexpr(5)
COLUMNS = tl.constexpr(6)


@triton.jit
def pointer(address, ALIGNED: tl.constexpr):
    """Convert an int64 address to a float32 pointer; ALIGNED promises a multiple of 16 bytes."""
    x_ptr = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    return x_ptr


@triton.jit
def block_of_segment(segments_ptr, segment_of_block_ptr, block, BLOCK: tl.constexpr):
    """Return a block's segment, a pointer to the segment's row, the block's start in it and its number of elements."""
    segment = tl.load(segment_of_block_ptr + block)
    row_ptr = segments_ptr + segment * COLUMNS
    start = (block - tl.load(row_ptr + FIRST_BLOCK)) * BLOCK  # int64
    return segment, row_ptr, start, tl.minimum(tl.load(row_ptr + NUMEL) - start, BLOCK).to(tl.int32)


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, in which case nothing runs now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceTable:
    """A small tensor on the device that the host can rewrite without waiting for the device."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)
        self._spare: Tensor | None = self._host()
        self._captured: list[Tensor] = []

    def _host(self) -> Tensor:
        # torch reuses the memory of a freed pinned tensor only after the copies from it are done
        return torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=self.tensor.is_cuda)

    def write(self, values: Sequence[object]) -> None:
        """Copy values to the device, or record the copy in the CUDA graph being captured.

        A graph reads its host tensor at every replay, so that tensor is kept. Memory cannot be pinned during a capture,
        so a spare tensor is always ready.
        """
        if is_capturing(self.tensor.device):
            if self._spare is None:
                raise RuntimeError(
                    "two CUDA graphs were captured without an eager step between them; take one before each capture"
                )
            host, self._spare = self._spare, None
            self._captured.append(host)
        else:
            host = self._host()
            self._spare = self._host() if self._spare is None else self._spare
        host.copy_(torch.tensor(values, dtype=host.dtype))
        self.tensor.copy_(host, non_blocking=True)


def extents(x: Tensor) -> list[tuple[int, int]]:
    """Return stride and size of the dimensions of x that have more than one element."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of x fill a range of memory without gaps or overlap, in any order."""
    expected = 1
    for stride, size in sorted(extents(x)):
        if stride != expected:
            return False
        expected *= size
    return True


class Segments:
    """The table of segments and the segment of each block, on the device."""

    table: Tensor  # [S, COLUMNS] int64
    segment_of_block: Tensor  # [blocks] int32
    blocks: int
    is_aligned: bool

    def __init__(self) -> None:
        self._addresses: list[int] | None = None

    def update(
        self,
        params: Sequence[Tensor],
        *,
        momenta: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        groups: Sequence[int],
    ) -> bool:
        """Rebuild the tables if a tensor has moved; return whether they were rebuilt.

        Raises ValueError for tensors of unsupported dtype or memory layout, and RuntimeError if one moved before a
        capture.
        """
        addresses = [0 if x is None else x.data_ptr() for x in chain(params, momenta, targets)]
        if addresses == self._addresses:
            return False
        device = params[0].device
        if is_capturing(device):
            raise RuntimeError("a parameter, momentum or target has moved; take one eager step before the capture")
        for p, *others in zip(params, momenta, targets, strict=True):
            _check(p, [x for x in others if x is not None])
        blocks = [triton.cdiv(p.numel(), BLOCK) for p in params]
        columns = [
            *(addresses[i : i + len(params)] for i in range(0, len(addresses), len(params))),
            [p.numel() for p in params],
            groups,
            list(accumulate(blocks, initial=0))[:-1],
        ]
        self.table = _upload(torch.tensor(columns).T.contiguous(), device)
        self.segment_of_block = _upload(torch.arange(len(params)).repeat_interleave(torch.tensor(blocks)).int(), device)
        self.blocks = sum(blocks)
        self.is_aligned = all(address % 16 == 0 for address in addresses)
        self._addresses = addresses
        return True


def _upload(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _check(p: Tensor, others: Sequence[Tensor]) -> None:
    """Raise ValueError unless p is dense float32 and the others have its shape, dtype, device and memory layout."""
    if p.dtype != torch.float32 or not is_dense(p):
        raise ValueError(
            f"a parameter is {p.dtype} of shape {list(p.shape)}, strides {list(p.stride())}; give float32 without gaps "
            "or overlap, such as contiguous or channels-last"
        )
    for x in others:
        if x.dtype != p.dtype or x.device != p.device or x.shape != p.shape or extents(x) != extents(p):
            raise ValueError(
                f"a momentum or target is {x.dtype} {list(x.shape)}, strides {list(x.stride())}, on {x.device}, its "
                f"parameter {p.dtype} {list(p.shape)}, strides {list(p.stride())}, on {p.device}; make them equal"
            )
