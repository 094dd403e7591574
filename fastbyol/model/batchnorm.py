"""Batch norm per view: each view of a batch is a population of its own, as if the network ran once per view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol.errors import ConfigError
from fastbyol.kernels.batchnorm import batch_norm_act, batch_norm_act_then, batch_norm_add_relu, batch_norm_eval
from fastbyol.kernels.batchnorm_pool import batch_norm_relu_pool, batch_norm_relu_pool_eval
from fastbyol.kernels.dispatch import runs_triton
from fastbyol.kernels.max_pool import max_pool
from fastbyol.kernels.pointwise import is_faster, pointwise_statistics
from fastbyol.kernels.reference import NormParams

Result = TypeVar("Result")
EPS = 1e-5
MOMENTUM = 0.1


class TakesViews:
    """What takes a batch as `views` populations, one after the other; see set_views_."""

    views: int


class _PerView(nn.modules.batchnorm._BatchNorm, TakesViews):
    """Batch norm over [V*B, ...] with training statistics per view; parameter and buffer names are torch's own.

    Attributes: `group`, the process group that shares its statistics, or None, see synchronize_; `joins_convolution`,
    whether its statistics are computed with the convolution before it, where `convolve` can, see join_convolutions_;
    `moves_statistics`, whether training moves its running statistics, see seeing_local_views.
    """

    joins_convolution = True

    def __init__(self, channels: int, *, views: int, eps: float = EPS, momentum: float = MOMENTUM) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.views, self.moves_statistics = views, True
        self.group: dist.ProcessGroup | None = None

    def _params(self) -> NormParams:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        moves = self.moves_statistics
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        return NormParams(
            *tensors,
            self.num_batches_tracked if moves else None,
            views=self.views,
            momentum=self.momentum if moves else 0.0,
            eps=self.eps,
            group=self.group,
        )


class _Act(_PerView):
    """Batch norm, then ReLU unless `relu` is False."""

    def __init__(self, channels: int, *, views: int, relu: bool = True) -> None:
        super().__init__(channels, views=views)
        self.relu = relu

    def forward(self, x: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Normalise [V*B, C, ...] per view in training, [N, C, ...] by the running statistics in evaluation.

        statistics: those of x in training, where `convolve` returned them.
        """
        if not self.training:
            return batch_norm_eval(x, None, self._params(), relu=self.relu)
        return batch_norm_act(x, self._params(), relu=self.relu, statistics=statistics)


class BatchNormAct1d(_Act, nn.BatchNorm1d):
    """Per-view batch norm and ReLU of vectors [V*B, C]."""


class BatchNormAct2d(_Act, nn.BatchNorm2d):
    """Per-view batch norm and ReLU of feature maps [V*B, C, H, W].

    Attribute `recomputes`: whether normalize_then computes this layer's output again in the backward.
    """

    recomputes = False


class BatchNormAddReLU2d(_PerView, nn.BatchNorm2d):
    """Per-view batch norm of feature maps [V*B, C, H, W], residual sum and ReLU: the end of a residual block."""

    def forward(  # type: ignore[override]  # more inputs
        self, x: Tensor, residual: Tensor, statistics: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the result twice, once for each consumer, so that the kernel can add their gradients.

        statistics: those of x in training, where `convolve` returned them.
        """
        if not self.training:
            z = batch_norm_eval(x, residual, self._params(), relu=True)
            return z, z
        return batch_norm_add_relu(x, residual, self._params(), statistics=statistics)


class Replacement(_PerView):
    """Per-view batch norm in the place of one of torch's or timm's, whose parameters and buffers it takes over.

    Its input is [V*B, C, ...] of any number of dimensions. timm's layer with an activation keeps that, and its drop.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, *, views: int) -> None:
        assert norm.momentum is not None  # see can_replace
        super().__init__(norm.num_features, views=views, eps=norm.eps, momentum=norm.momentum)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.relu = isinstance(getattr(norm, "act", None), nn.ReLU) and isinstance(norm.drop, nn.Identity)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each view by itself in training, by the running statistics in evaluation, then activate."""
        # rows, not an added dimension: torch 2.13's gradient of [N, C, L, 1] in channels-last order is wrong on a CPU
        rows = x if x.ndim in (2, 4) else x.flatten(2).transpose(1, 2).flatten(0, 1)
        if self.training:
            y = batch_norm_act(rows, self._params(), relu=self.relu)
        else:
            y = batch_norm_eval(rows, None, self._params(), relu=self.relu)
        if rows is not x:
            y = y.view(len(x), -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        for layer in () if self.relu else self.children():
            y = layer(y)
        return y


def can_replace(norm: nn.Module) -> bool:
    """Tell whether Replacement computes what this layer does: torch's own or timm's, with parameters and statistics."""
    kind = type(norm)
    is_known = kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or (
        kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
    )
    return (
        is_known
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
    )


def has_population(layer: nn.Module) -> bool:
    """Tell whether a layer normalises by its batch in training: a batch norm, or one with running statistics."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) or getattr(layer, "running_var", None) is not None


def replace_norms_(module: nn.Module, *, views: int) -> list[str]:
    """Put a Replacement in the place of every batch norm inside a module, if all of them can be replaced.

    One that has several places gets the same Replacement in each. Returns the kinds of those that cannot be replaced;
    where there are any, nothing is replaced.
    """
    others = {
        type(layer).__name__
        for layer in module.modules()
        if has_population(layer) and not isinstance(layer, _PerView) and not can_replace(layer)
    }
    if not others:
        made: dict[nn.Module, Replacement] = {}
        for parent in list(module.modules()):
            for name, layer in list(parent._modules.items()):  # named_children() leaves out a layer's second name
                if isinstance(layer, nn.modules.batchnorm._BatchNorm) and can_replace(layer):
                    if layer not in made:
                        made[layer] = Replacement(layer, views=views)
                    setattr(parent, name, made[layer])
    return sorted(others)


def convolve(convolution: nn.Module, x: Tensor, norm: nn.Module) -> tuple[Tensor, ...]:
    """Return convolution(x), followed by the statistics of the batch norm after it where one kernel computes both.

    That is a 1x1 convolution in training before a norm that `joins_convolution`, where the Triton kernel is faster.
    """
    if not (
        isinstance(norm, _PerView)
        and norm.joins_convolution
        and norm.training
        and runs_triton(x)
        and isinstance(convolution, nn.Conv2d)
        and joins(convolution, x)
    ):
        return (convolution(x),)
    return pointwise_statistics(x, convolution.weight, norm._params())


def joins(convolution: nn.Conv2d, x: Tensor) -> bool:
    """Return whether kernels/pointwise.py convolves x, and faster: 1x1, stride 1, no bias, channels 8 divides."""
    form = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.groups, convolution.bias)
    inputs, channels = convolution.in_channels, convolution.out_channels
    can = form == ((1, 1), (1, 1), (0, 0), 1, None) and not (inputs | channels) % 8
    return can and is_faster(x, inputs=inputs, channels=channels)


def normalize_then(norm: nn.Module, x: Tensor, consumer: Callable[[Tensor], Result], *statistics: Tensor) -> Result:
    """Return consumer(norm(x)); with `norm.recomputes`, norm(x) is not kept but computed again in the backward.

    The result is the same, bit for bit. On a GPU this saves memory of x's size and costs one read and one write of it.
    Where the Triton kernels do not run, nothing is recomputed. statistics: those of x, if `convolve` returned them.
    """
    if not (
        isinstance(norm, BatchNormAct2d)
        and norm.recomputes
        and norm.training
        and torch.is_grad_enabled()
        and runs_triton(x)
    ):
        return consumer(norm(x, *statistics))
    given = statistics[0] if statistics else None
    return batch_norm_act_then(consumer, x, norm._params(), relu=norm.relu, statistics=given)


def normalize_and_pool(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 3x3 max pooling, at stride 2, of norm(x) twice, [N, C, ceil(H/2), ceil(W/2)], once for each consumer.

    x: [N, C, H, W]. The output of a BatchNormAct2d with ReLU is not written to memory where the Triton kernels run.
    """
    if isinstance(norm, BatchNormAct2d) and norm.relu:
        return (batch_norm_relu_pool if norm.training else batch_norm_relu_pool_eval)(x, norm._params())
    return max_pool(norm(x))


def synchronize_(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Share the statistics of every batch norm in the module among the ranks of a group; None stops sharing.

    Raises ConfigError for a layer with running statistics that is none of this module's, whose ranks would go apart.
    """
    for layer in module.modules():
        if isinstance(layer, _PerView):
            layer.group = group
        elif group is not None and has_population(layer):
            raise ConfigError(
                f"a {type(layer).__name__} of the network cannot share its statistics among ranks; build it of "
                "torch.nn.BatchNorm2d with weight, bias and running statistics, or train on one rank"
            )


def join_convolutions_(module: nn.Module, enabled: bool) -> None:
    """Choose whether the 1x1 convolutions of a ResNet compute the statistics of the batch norms after them.

    On a GPU that saves reading their output once more, see kernels/pointwise.py; they do by default. Sums are taken in
    another order.
    """
    for layer in module.modules():
        if isinstance(layer, _PerView):
            layer.joins_convolution = enabled


def set_views_(module: nn.Module, views: int) -> None:
    """Make every batch norm in the module, and every encoder with a forward per view, take a batch as `views` views."""
    for layer in module.modules():
        if isinstance(layer, TakesViews):
            layer.views = views


@contextmanager
def seeing_local_views(*modules: nn.Module, views: int) -> Iterator[None]:
    """Take batches in the with-block as so many local views: populations that do not move the running statistics."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, TakesViews)]
    before = [layer.views for layer in layers]
    for layer in layers:
        layer.views = views
        if isinstance(layer, _PerView):
            layer.moves_statistics = False
    try:
        yield
    finally:
        for layer, number in zip(layers, before, strict=True):
            layer.views = number
            if isinstance(layer, _PerView):
                layer.moves_statistics = True


@torch.no_grad()
def recalibrate_(
    module: nn.Module, batches: Iterable[Tensor], *, autocast: AbstractContextManager[Any] | None = None
) -> None:
    """Replace a module's running statistics by about their mean over these batches [V*B, ...], equally weighted.

    Use it where the weights have moved, or the views have changed, faster than running statistics of momentum 0.1
    follow. autocast: the precision to compute in. Leaves the module in evaluation mode, no longer sharing its
    statistics with other ranks.
    """
    synchronize_(module, None)
    layers = [layer for layer in module.modules() if isinstance(layer, _PerView)]
    momenta = [layer.momentum for layer in layers]
    module.train()
    for number, batch in enumerate(batches, start=1):
        for layer in layers:
            layer.momentum = 1 / number
        with autocast or nullcontext():
            module(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    module.eval()
