"""Tensors that autograd does not keep for the backward but computes again there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def recomputed(kept: Tensor, compute: Callable[[], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which operations that would keep `kept` call `compute` in their backward instead.

    compute: returns the same values; what it holds must not depend on `kept`.
    """
    place = kept.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        return compute if saved.untyped_storage()._cdata == place else saved

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
