"""Know LARS as BYOL uses it, with the EMA target folded into its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.kernels import reference


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling; after each update the target of every parameter follows it.

    Group settings: `lr`, `momentum`, `weight_decay`, `trust` (None: ratio 1, for biases and batch norm) and `tau`.
    `target_of` maps parameters to their EMA targets, same shape; parameters without one are only updated. A parameter
    without a gradient is an error: its momentum and target would fall behind in silence. Source: the authors' code
    (byol-spec, LARS).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float | None = 1e-3,
        tau: float = 1.0,
        target_of: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "tau": tau}
        super().__init__(params, defaults)
        self.target_of = dict(target_of or {})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update momenta, parameters and targets in place; return the closure's loss when one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = group["params"]
            reference.lars_(
                params,
                [_gradient(p) for p in params],
                [self._momentum(p) for p in params],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                trust=group["trust"],
            )
            pairs = [(self.target_of[p], p) for p in params if p in self.target_of]
            if pairs:
                targets, followed = zip(*pairs, strict=True)
                reference.ema_(targets, followed, tau=group["tau"])
        return loss

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        return momentum

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and the EMA rate of every group for the next step."""
        for group in self.param_groups:
            group["lr"], group["tau"] = lr, tau


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(
            f"LARS found no gradient for a parameter of shape {tuple(parameter.shape)}; call backward() first, "
            "or keep parameters outside the loss out of the optimiser"
        )
    return parameter.grad


def parameter_groups(module: nn.Module, *, weight_decay: float, trust: float) -> list[dict[str, Any]]:
    """Split trainable parameters: weights adapt and decay; biases and batch norm, of one dimension, do neither."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay, "trust": trust},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "trust": None},
    ]


def build(module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> LARS:
    """Build LARS over the trainable parameters of a module with the paper's exclusions."""
    groups = parameter_groups(module, weight_decay=config.weight_decay, trust=config.trust)
    return LARS(groups, momentum=config.momentum, target_of=target_of)
