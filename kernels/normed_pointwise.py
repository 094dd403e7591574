"""Batch norm and ReLU of a 1x1 convolution's input, computed where the convolution and its gradients pass anyway.

    z = relu(batch norm of x),  y = the 1x1 convolution of z,  and batch norm's statistics of y, as in pointwise.py

Two fusions, each by itself or both:

    in the prologue   z is computed as the convolution, and its weight's gradient, load x: pointwise_prologue.py
    in the epilogue   the gradient of z goes through the ReLU and is summed as it is computed: pointwise_epilogue.py

Elements of z's size moved, beside the convolution's own and its gradients':

    neither      forward x, x, z; backward dz, x for the sums, dz, x, dx
    prologue     forward x: z is neither written nor read, 2 fewer
    epilogue     backward x, g, x, dx: dz is read once less

With a process group sums and counts of all ranks are added, as in batchnorm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm import apply_norm, backward_apply, backward_sums, channels_last, prepare
from fastbyol.kernels.batchnorm_statistics import finish, reduce_splits
from fastbyol.kernels.dispatch import autocast_dtype, runs_triton
from fastbyol.kernels.pointwise import EXACT, NARROW, flat, gradients, multiply, tiles_for, unflat
from fastbyol.kernels.pointwise_epilogue import TILES, masked_gradient
from fastbyol.kernels.pointwise_prologue import gradient_tiles_for, normed_multiply, normed_weight_gradient
from fastbyol.kernels.reference import NormParams


class Fusion(NamedTuple):
    """What is computed within the convolution and its gradients.

    in_prologue: z, which is then not kept; in_epilogue: the ReLU's gradient and batch norm's sums; recomputes: z is not
    kept but computed again for the weight's gradient, where it is not in_prologue.
    """

    in_prologue: bool
    in_epilogue: bool
    recomputes: bool = False


class _NormedPointwise(torch.autograd.Function):
    """Batch norm, ReLU and a 1x1 convolution of x, and the statistics of the result, which have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        bias: Tensor,
        weight: Tensor,
        statistics: Tensor,
        norms: tuple[NormParams, NormParams],
        fusion: Fusion,
    ) -> tuple[Tensor, Tensor]:
        norm, after = norms
        matrix, shift, z = weight.flatten(1), after.running_mean, None
        if fusion.in_prologue:
            tiles = EXACT if x.dtype == torch.float32 else NARROW
            y, partial = normed_multiply(flat(x), matrix, statistics, (scale, bias), shift, tiles=tiles)
        else:
            z = _activated(x, scale, bias, statistics)
            tiles = tiles_for(x.shape[1], len(weight), x.dtype)
            y, partial = multiply(flat(z), matrix, shift, groups=norm.views, tiles=tiles)
        after_statistics = finish(partial, len(y) // norm.views, after)
        ctx.save_for_backward(x, scale, bias, weight, statistics, None if fusion.recomputes else z)
        ctx.fusion, ctx.group = fusion, norm.group
        ctx.mark_non_differentiable(after_statistics)
        ctx.set_materialize_grads(False)  # the statistics have none, and none is made
        return unflat(y, x), after_statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, bias, weight, statistics, _ = ctx.saved_tensors
        dy = channels_last(dy)
        dweight = _weight_gradient(ctx, dy) if ctx.needs_input_grad[3] else None
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, dweight, None, None, None
        in_epilogue = ctx.fusion.in_epilogue
        if in_epilogue:
            tiles = EXACT if x.dtype == torch.float32 else TILES
            rows, partial = masked_gradient(
                flat(dy), weight.flatten(1), flat(x), statistics, (scale, bias), tiles=tiles
            )
            g = unflat(rows, x)
        else:
            dz, _ = gradients(dy, x, weight, of_x=True, of_weight=False)
            assert dz is not None
            g = channels_last(dz)
            partial = backward_sums(g, None, x, None, None, statistics, scale, bias, relu=True)
        dbias, dscale = torch.empty_like(bias), torch.empty_like(scale)
        count = x.numel() // statistics[0].numel()
        sums = reduce_splits(partial, count, totals=(dbias, dscale), group=ctx.group)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = backward_apply(g, x, statistics, scale, bias, sums, relu=not in_epilogue)
        return dx, dscale, dbias, dweight, None, None, None


def _activated(x: Tensor, scale: Tensor, bias: Tensor, statistics: Tensor) -> Tensor:
    mean, rstd = statistics
    return apply_norm(x, None, mean, rstd, scale, bias, relu=True)[0]


def _weight_gradient(ctx: Any, dy: Tensor) -> Tensor:
    """Return the gradient of the convolution's weight [N, K, 1, 1]."""
    x, scale, bias, weight, statistics, z = ctx.saved_tensors
    if ctx.fusion.in_prologue:
        tiles = gradient_tiles_for(x.shape[1], x.dtype)
        return normed_weight_gradient(flat(dy), flat(x), statistics, (scale, bias), tiles=tiles).view(weight.shape)
    if z is None:
        z = _activated(x, scale, bias, statistics)
    _, dweight = gradients(dy, z, weight, of_x=False, of_weight=True)
    assert dweight is not None
    return dweight


def normed_pointwise(
    x: Tensor, norm: NormParams, weight: Tensor, after: NormParams, fusion: Fusion
) -> tuple[Tensor, Tensor]:
    """Convolve relu(batch norm of x) with weight [N, K, 1, 1]; return [V*B, N, H, W] and its statistics for `after`.

    x is [V*B, K, H, W], view-major. The running statistics of both batch norms are updated. Values and gradients are
    those of batch_norm_act and pointwise_statistics; see reference.normed_pointwise. K and N are multiples of 8, in
    float32 of 4.
    """
    if not runs_triton(x):
        return reference.normed_pointwise(x, norm, weight, after)
    reference.check_pointwise(x, weight, after)
    dtype = autocast_dtype(x)
    x, statistics = prepare(x.to(dtype), norm)
    result: tuple[Tensor, Tensor] = _NormedPointwise.apply(
        x, norm.weight, norm.bias, weight.to(dtype), statistics, (norm, after), fusion
    )
    return result
