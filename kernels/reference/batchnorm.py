"""Batch norm with statistics per view, over ranks and for evaluation, and max-pooling, in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class NormParams(NamedTuple):
    """What a batch norm of C channels takes besides its input.

    weight, bias: [C]. running_mean, running_var: [C], updated in place in training. num_batches_tracked: int64, counts
    the views seen in training; None if they are not counted. views: the number of populations in a batch, one after the
    other. group: the ranks that share statistics, or None.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None
    views: int
    momentum: float
    eps: float
    group: dist.ProcessGroup | None = None


def check_channels(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless x is [N, C] or [N, C, H, W] with the C channels of weight [C]."""
    if x.ndim not in (2, 4) or x.shape[1] != len(weight):
        raise ValueError(f"batch norm of C = {len(weight)} channels got {list(x.shape)}; give [N, C] or [N, C, H, W]")


def check_views(x: Tensor, norm: NormParams) -> None:
    """Raise ValueError unless x splits into views and each channel has at least 2 values, as a variance needs.

    With a group, other ranks contribute values too, and one is enough.
    """
    check_channels(x, norm.weight)
    views = norm.views
    if x.shape[0] % views:
        raise ValueError(
            f"batch norm got {x.shape[0]} rows for {views} views; give views of equal size, one after "
            "the other, or for one population a network of views=1"
        )
    if norm.group is None and x.numel() // (x.shape[1] * views) < 2:
        raise ValueError(f"batch norm got {list(x.shape)} for {views} views, one value per channel; give more images")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise ValueError unless the residual has the shape of x."""
    if residual.shape != x.shape:
        raise ValueError(f"batch norm got a residual {list(residual.shape)} for x {list(x.shape)}; give equal shapes")


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks of a group; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None


def _moments(x: Tensor, norm: NormParams, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return d = x - running mean [V, B, C, ...], its mean and variance [V, C]; update the running statistics."""
    running_mean, running_var, channels = norm.running_mean, norm.running_var, x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    d = x.unflatten(0, (norm.views, -1)).to(wide) - running_mean.view(1, 1, -1, *[1] * (x.ndim - 2))
    across = [i for i in range(d.ndim) if i not in (0, 2)]
    local_count = d.new_full((norm.views, 1), d[0].numel() // channels)
    sums = torch.cat((d.sum(across), d.square().sum(across), local_count), 1)
    joined: Tensor = sums if group is None else _SumOverRanks.apply(sums, group)
    total, square, count = joined.split((channels, channels, 1), 1)
    offset = total / count
    variance = (square / count - offset.square()).clamp_min(0)
    with torch.no_grad():
        for mean, unbiased in zip(running_mean + offset, variance * (count / (count - 1)), strict=True):
            running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), norm.momentum)
    return d, offset, variance


@torch.no_grad()
def _keep_finite(norm: NormParams, mean: Tensor, var: Tensor) -> None:
    """Take over new running statistics in the channels where both are finite."""
    is_finite = mean.isfinite() & var.isfinite()
    norm.running_mean.copy_(torch.where(is_finite, mean, norm.running_mean))
    norm.running_var.copy_(torch.where(is_finite, var, norm.running_var))


def _synchronized_batch_norm(x: Tensor, norm: NormParams, group: dist.ProcessGroup) -> Tensor:
    """Normalise x with statistics of d = x - running mean over a group; one all-reduce of [V, 2C+1] sums each way."""
    weight, bias, views, eps = norm.weight, norm.bias, norm.views, norm.eps
    d, offset, variance = _moments(x, norm, group)
    per_channel, per_view = ((count, 1, -1, *[1] * (x.ndim - 2)) for count in (1, views))
    xhat = (d - offset.view(per_view)) * torch.rsqrt(variance + eps).view(per_view)
    return torch.addcmul(bias.view(per_channel), xhat, weight.view(per_channel)).flatten(0, 1).to(x.dtype)


def batch_norm_act(x: Tensor, norm: NormParams, *, relu: bool) -> Tensor:
    """Normalise x with the batch statistics of each view, like `views` separate forwards, then apply ReLU if `relu`.

    x is [V*B, C] or [V*B, C, H, W], view-major. The running statistics are updated view after view, with the unbiased
    variance; a channel where either would become inf or NaN keeps both. With a group, a view's statistics are over all
    ranks, whose running statistics must be equal and whose B may differ; gradients of weight and bias are those of the
    own rank. Raises ValueError if the first dimension does not split into views, or if a channel has one value per
    view.
    """
    check_views(x, norm)
    weight, bias, running_mean, running_var, num_batches_tracked, views, momentum, eps, group = norm
    if num_batches_tracked is not None:
        num_batches_tracked.add_(views)
    mean, var = running_mean.clone(), running_var.clone()
    if group is not None:
        y = _synchronized_batch_norm(x, norm._replace(running_mean=mean, running_var=var), group)
    else:
        y = torch.cat([F.batch_norm(part, mean, var, weight, bias, True, momentum, eps) for part in x.chunk(views)])
    _keep_finite(norm, mean, var)
    return y.relu_() if relu else y


def check_pointwise(x: Tensor, weight: Tensor, norm: NormParams) -> None:
    """Raise ValueError unless x [V*B, K, H, W] and weight [N, K, 1, 1] fit, and give the N channels of norm."""
    if x.ndim != 4 or weight.shape != (len(norm.weight), x.shape[1], 1, 1):
        raise ValueError(
            f"a 1x1 convolution before a batch norm of {len(norm.weight)} channels got x {list(x.shape)} and a weight "
            f"{list(weight.shape)}; give [N, K, H, W] and [{len(norm.weight)}, K, 1, 1]"
        )
    check_views(x[:, :1].expand(-1, len(norm.weight), -1, -1), norm)


def pointwise_statistics(x: Tensor, weight: Tensor, norm: NormParams) -> tuple[Tensor, Tensor]:
    """Convolve x [V*B, K, H, W] with weight [N, K, 1, 1]; return [V*B, N, H, W] and mean and rstd of it, [2, V, N].

    The statistics are of each view, over the ranks of the group if there is one, and have no gradient of their own:
    batch norm's is that of statistics and x. The running statistics are updated, as in batch_norm_act.
    """
    check_pointwise(x, weight, norm)
    y = F.conv2d(x, weight)
    with torch.no_grad():
        updated = norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
        _, offset, variance = _moments(y, updated, norm.group)
        statistics = torch.stack((norm.running_mean + offset, torch.rsqrt(variance + norm.eps)))
        _keep_finite(norm, updated.running_mean, updated.running_var)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(norm.views)
    return y, statistics


def batch_norm_add_relu(x: Tensor, residual: Tensor, norm: NormParams) -> tuple[Tensor, Tensor]:
    """Compute relu(batch norm of x + residual) and return it twice, once for each of two consumers.

    The residual has the shape of x; everything else is as in batch_norm_act.
    """
    check_residual(x, residual)
    y = batch_norm_act(x, norm, relu=False)
    z = y.add_(residual).relu_()
    return z, z


def batch_norm_eval(x: Tensor, residual: Tensor | None, norm: NormParams, *, relu: bool) -> Tensor:
    """Normalise x with the running statistics, add the residual if given, then apply ReLU if `relu`."""
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pool x [N, C, H, W] by 3x3 windows, stride 2, padding 1; return [N, C, OH, OW] twice, for two consumers."""
    z = F.max_pool2d(x, 3, 2, 1)
    return z, z
