"""bfloat16 copies of parameters and their EMA targets, which a LARS step writes beside them.

Under autocast a convolution computes with its weight rounded to bfloat16, and each step rounds it anew: a launch and 6
bytes an element. A copy that lars_ema.py's sweep writes costs 2 bytes more there and no launch.

Copies have the blocks of segments.py: a block of a tensor is BLOCK elements here, also where it is the last and shorter
one, so that the sweep finds them by its block's number. They are derived from the tensors, never part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
from torch import Tensor

from fastbyol.kernels.segments import BLOCK


class Shadows:
    """The copies: `of` maps each tensor to its own, of the same shape and memory layout.

    memory: [2, blocks, BLOCK] bfloat16, of the parameters, then of their targets.
    """

    def __init__(self, params: Sequence[Tensor], targets: Sequence[Tensor | None]) -> None:
        blocks = [triton.cdiv(p.numel(), BLOCK) for p in params]
        self.memory = torch.zeros((2, sum(blocks), BLOCK), dtype=torch.bfloat16, device=params[0].device)
        self.of: dict[Tensor, Tensor] = {}
        for tensors, memory in zip((params, targets), self.memory, strict=True):
            for x, block in zip(tensors, accumulate(blocks, initial=0), strict=False):
                if x is not None:
                    start = memory.storage_offset() + block * BLOCK
                    self.of[x] = memory.as_strided(x.shape, x.stride(), start)
        self._order = [*params, *targets]
        self._versions: list[int] = []

    def check(self, params: Sequence[Tensor], targets: Sequence[Tensor | None]) -> None:
        """Raise ValueError unless these are the tensors, in this order, and still have their copies' memory layout."""
        given = [*params, *targets]
        if len(given) != len(self._order) or not all(x is y for x, y in zip(self._order, given, strict=True)):
            raise ValueError("LARS has other parameters or targets than when it began to keep copies; begin anew")
        for x, copied in self.of.items():
            if x.stride() != copied.stride() or x.device != copied.device:
                raise ValueError(
                    f"a parameter or target of shape {list(x.shape)} has moved or changed its memory layout since LARS "
                    "began to keep copies; begin anew"
                )

    @torch.no_grad()
    def refresh_(self) -> None:
        """Round anew if anything but the sweep has changed a tensor in place, such as a state that was loaded."""
        if self._versions != self._versions_now():
            torch._foreach_copy_(list(self.of.values()), list(self.of))
            self.mark_fresh()

    def mark_fresh(self) -> None:
        """Take note that the copies are those of the tensors as they are."""
        self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [x._version for x in self.of]
