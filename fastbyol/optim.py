"""Know LARS as BYOL uses it, with the EMA target folded into its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.kernels.lars_ema import Workspace, lars_ema_
from fastbyol.kernels.reference import LarsGroup, LarsRates


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling; after each update the target of every parameter follows it.

    Group settings: `lr`, `momentum`, `weight_decay`, `trust` (None: ratio 1, for biases and batch norm) and `tau`.
    `target_of` maps parameters to their EMA targets, same shape; parameters without one are only updated. A parameter
    without a gradient is an error: its momentum and target would fall behind in silence. Source: the authors' code
    (byol-spec, LARS).

    A step with inf or NaN in any gradient changes nothing but `skipped` [2] int32, on the parameters' device: such
    steps in all and in a row.
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
        self.skipped = torch.zeros(2, dtype=torch.int32, device=self._device)
        self._workspace = Workspace()
        self._write_rates()

    def __getstate__(self) -> dict[str, Any]:
        """Name what copies and pickles hold; the workspace, which is addresses, is made anew."""
        return {**super().__getstate__(), "target_of": self.target_of, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copy's state, or in load_state_dict that of groups and momenta."""
        super().__setstate__(state)
        self.__dict__.setdefault("_workspace", Workspace())
        self._write_rates()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update momenta, parameters and targets in place; return the closure's loss when one is given.

        No host sync on a GPU. In a captured CUDA graph the rates are those of the last set_rates before a replay.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.skipped = self.skipped.to(self._device)
        groups = [
            LarsGroup(
                params=group["params"],
                grads=[_gradient(p) for p in group["params"]],
                momenta=[self._momentum(p) for p in group["params"]],
                targets=[self.target_of.get(p) for p in group["params"]],
                rates=_rates(group),
            )
            for group in self._groups
        ]
        lars_ema_(groups, skipped=self.skipped, workspace=self._workspace)
        return loss

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["params"]]

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._groups[0]["params"][0].device
        return device

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        momentum: Tensor | None = state.get("momentum")
        if momentum is None:
            momentum = state["momentum"] = torch.zeros_like(parameter)
        elif momentum.stride() != parameter.stride():  # loaded, or the model went to channels-last
            momentum = state["momentum"] = torch.empty_like(parameter).copy_(momentum)
        return momentum

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and the EMA rate of every group for the next step, or the next replay of a graph."""
        for group in self.param_groups:
            group["lr"], group["tau"] = lr, tau
        self._write_rates()

    def _write_rates(self) -> None:
        self._workspace.set_rates([_rates(group) for group in self._groups], self._device)

    @property
    def tau(self) -> Tensor:
        """The EMA rate, a float64 scalar on the parameters' device, as of the last set_rates or step."""
        return self._workspace.tau


def _rates(group: dict[str, Any]) -> LarsRates:
    return LarsRates(*(group[name] for name in LarsRates._fields))


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
