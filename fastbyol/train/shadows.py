"""A forward that computes with the bfloat16 copies of weights that LARS keeps, instead of casting each weight anew.

The results are those of autocast, bit for bit, and so are the gradients: autocast rounds a weight in the same way, and
hands its gradient on in float32 as is done here. A ResNet-50's step casts 115 weights and biases, in as many launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastbyol.byol import BYOL, Output
from fastbyol.encoder import ResNet
from fastbyol.errors import require
from fastbyol.kernels.dispatch import autocast_dtype
from fastbyol.optim import LARS


class _Copied(torch.autograd.Function):
    """A parameter's copy; its gradient, widened to the parameter's dtype, is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copied: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copied.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


class ShadowedForward:
    """BYOL's forward under autocast to bfloat16, with LARS's copies in the place of weights and their targets.

    It stands for `forward` of the engines Eager and Graph (step.py) on one rank. What LARS does not
    move, such as frozen parameters, is cast by autocast. Raises ConfigError for an encoder that is not a ResNet of
    fastbyol, which may use its weights in other ways than in a convolution, and, when called, in another precision or
    for a lagged target, which follows the weights themselves.
    """

    def __init__(self, model: BYOL, lars: LARS) -> None:
        encoder = model.online.encoder
        require(
            type(encoder) is ResNet,
            f"copies of weights with encoder {encoder.config.arch}, but only fastbyol's own ResNets are known to use "
            "them in convolutions alone",
        )
        self.model, self.shadows = model, lars.keep_shadows()
        self._names = [name for name in _cast_by_autocast(model) if model.get_parameter(name) in self.shadows.of]

    def __call__(self, *views: Tensor, tau: Tensor | None = None) -> Output:
        """Compute the loss of views [V*B, 3, H, W], and of local ones after them; see BYOL.forward."""
        dtype = autocast_dtype(views[0])
        require(dtype == torch.bfloat16, f"copies of weights in bfloat16, and {dtype} to compute in; make them equal")
        require(tau is None, "copies of weights with a lagged target, which they do not move; leave one out")
        self.shadows.refresh_()
        output: Output = functional_call(self.model, self._weights(), views)
        return output

    def _weights(self) -> dict[str, Tensor]:
        """Return a copy for the name of each weight, with the weight's place in autograd."""
        named = ((name, self.model.get_parameter(name)) for name in self._names)
        copied = self.shadows.of
        return {name: _Copied.apply(x, copied[x]) for name, x in named}  # type: ignore[no-untyped-call]  # torch's


def _cast_by_autocast(model: BYOL) -> Iterator[str]:
    """Name the parameters of convolutions and linear layers."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            yield from (f"{name}.{kind}" for kind, _ in layer.named_parameters(recurse=False))
