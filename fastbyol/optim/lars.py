"""LARS as BYOL uses it, and SGD as a case of it, with the EMA update of the target network in the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.kernels.lars_ema import Workspace, lars_ema_
from fastbyol.kernels.reference import LarsGroup, LarsRates
from fastbyol.optim.groups import configured_groups, gradient_of, set_lr


class LARS(torch.optim.Optimizer):
    """LARS (layer-wise adaptive rate scaling); each step also moves the EMA targets of the parameters.

    Group settings: `lr`, `momentum`, `weight_decay`, `trust` (None: ratio 1, for biases and batch norm), `tau` and, for
    set_rates, `lr_scale` (1 where it is missing).
    `target_of` maps parameters to their EMA targets of the same shape; parameters without a target are only updated.
    step() raises MissingGradient for a parameter without a gradient: its momentum and target would fall behind
    silently. Source: paper, section 3.2; the authors' code.

    A step with inf or NaN in any gradient changes nothing but `skipped`, [2] int32 on the parameters' device: the
    number of such steps in all, and in a row up to now.
    """

    is_capturable = True
    skips_bad_steps = True
    needs_gradients = True

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
        """Return the state for copies and pickles, without the workspace: it holds addresses and is made anew."""
        return {**super().__getstate__(), "target_of": self.target_of, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state of a copy or, from load_state_dict, the groups and momenta."""
        super().__setstate__(state)
        self.__dict__.setdefault("_workspace", Workspace())
        self._write_rates()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update momenta, parameters and targets in place; return the closure's loss, if a closure is given.

        No host sync on a GPU. In a captured CUDA graph a replay uses the rates of the last set_rates.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.skipped = self.skipped.to(self._device)
        groups = [
            LarsGroup(
                params=group["params"],
                grads=[gradient_of(p) for p in group["params"]],
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
        elif momentum.stride() != parameter.stride():  # after load_state_dict, or after the model became channels-last
            momentum = state["momentum"] = torch.empty_like(parameter).copy_(momentum)
        return momentum

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate, times a group's `lr_scale`, and tau for the next step or CUDA graph replay."""
        set_lr(self.param_groups, lr)
        for group in self.param_groups:
            group["tau"] = tau
        self._write_rates()

    def _write_rates(self) -> None:
        self._workspace.set_rates([_rates(group) for group in self._groups], self._device)

    @property
    def tau(self) -> Tensor:
        """The EMA rate of the last set_rates or step, a float64 scalar on the parameters' device."""
        return self._workspace.tau


def _rates(group: dict[str, Any]) -> LarsRates:
    return LarsRates(*(group[name] for name in LarsRates._fields))


def build(module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> LARS:
    """Build LARS over a module's trainable parameters, with biases and batch norm excluded as in the paper."""
    return LARS(configured_groups(module, config), momentum=config.momentum, target_of=target_of)


def build_sgd(module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> LARS:
    """Build SGD with momentum, which is LARS with the ratio 1: weights decay, biases and batch norm do not."""
    groups = [{**group, "trust": None} for group in configured_groups(module, config)]
    return LARS(groups, momentum=config.momentum, target_of=target_of)
