"""Know batch norm per view: each view of a batch is its own population, as if the network ran once a view."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol.kernels.batchnorm import batch_norm_act, batch_norm_act_then, batch_norm_add_relu, batch_norm_eval
from fastbyol.kernels.dispatch import runs_triton

EPS = 1e-5
MOMENTUM = 0.1


class _PerView(nn.modules.batchnorm._BatchNorm):
    """Batch norm over [V*B, ...] whose training statistics are taken per view; names and buffers are torch's own.

    Attribute `group`: the process group whose ranks share statistics, or None; see synchronize_.
    """

    def __init__(self, channels: int, *, views: int = 2) -> None:
        super().__init__(channels, eps=EPS, momentum=MOMENTUM)
        self.views = views
        self.group: dist.ProcessGroup | None = None

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.weight, self.bias, self.running_mean, self.running_var

    def _options(self) -> dict[str, Any]:
        assert self.momentum is not None
        return {"views": self.views, "momentum": self.momentum, "eps": EPS, "group": self.group}


class _Act(_PerView):
    """Batch norm, then ReLU unless `relu` is False."""

    def __init__(self, channels: int, *, views: int = 2, relu: bool = True) -> None:
        super().__init__(channels, views=views)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [V*B, C, ...] per view in training, [N, C, ...] by the running statistics in evaluation."""
        if not self.training:
            return batch_norm_eval(x, None, *self._tensors(), relu=self.relu, eps=EPS)
        return batch_norm_act(x, *self._tensors(), self.num_batches_tracked, relu=self.relu, **self._options())


class BatchNormAct1d(_Act, nn.BatchNorm1d):
    """Per-view batch norm and ReLU of vectors [V*B, C]."""


class BatchNormAct2d(_Act, nn.BatchNorm2d):
    """Per-view batch norm and ReLU of feature maps [V*B, C, H, W].

    Attribute `recomputes`: whether what `then` hands on is computed again in the backward; see there.
    """

    recomputes = False


class BatchNormAddReLU2d(_PerView, nn.BatchNorm2d):
    """Per-view batch norm of feature maps [V*B, C, H, W], a residual sum and ReLU: the end of a residual block."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # two inputs
        """Return the result twice, once for each consumer, so that the kernel can add their gradients."""
        if not self.training:
            z = batch_norm_eval(x, residual, *self._tensors(), relu=True, eps=EPS)
            return z, z
        return batch_norm_add_relu(x, residual, *self._tensors(), self.num_batches_tracked, **self._options())


def then(norm: nn.Module, x: Tensor, consumer: nn.Module) -> Tensor:
    """Return consumer(norm(x)); where `norm.recomputes`, what it keeps of norm(x) for its backward is computed again.

    The results are the same bits. On a GPU it saves memory of x's size and costs a read and a write of it; where the
    kernels do not run, nothing is recomputed.
    """
    if not (
        isinstance(norm, BatchNormAct2d)
        and norm.recomputes
        and norm.training
        and torch.is_grad_enabled()
        and runs_triton(x)
    ):
        result: Tensor = consumer(norm(x))
        return result
    return batch_norm_act_then(
        consumer, x, *norm._tensors(), norm.num_batches_tracked, relu=norm.relu, **norm._options()
    )


def synchronize_(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Let every batch norm inside the module share its statistics with the ranks of a group; None ends that."""
    for layer in module.modules():
        if isinstance(layer, _PerView):
            layer.group = group


@torch.no_grad()
def recalibrate_(
    module: nn.Module, batches: Iterable[Tensor], *, autocast: AbstractContextManager[Any] | None = None
) -> None:
    """Renew the running statistics inside a module: about their mean over these batches [V*B, ...], equally weighted.

    For weights that have moved faster, or views that have changed, than running statistics of momentum .1 follow.
    autocast: the precision to compute in. The module is left in evaluation mode, and no longer shares its statistics
    with other ranks.
    """
    synchronize_(module, None)
    layers = [layer for layer in module.modules() if isinstance(layer, _PerView)]
    module.train()
    for number, batch in enumerate(batches, start=1):
        for layer in layers:
            layer.momentum = 1 / number
        with autocast or nullcontext():
            module(batch)
    for layer in layers:
        layer.momentum = MOMENTUM
    module.eval()
