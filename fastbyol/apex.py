"""Know which pieces of NVIDIA apex are installed, and how BYOL trains under apex's LARC.

apex drops pieces from release to release, so each is probed by import. It is never required.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config import ConfigError, OptimConfig
from fastbyol.kernels import reference
from fastbyol.optim import parameter_groups

PIECES = {  # where a piece is, and which builds of apex have it
    "LARC": ("apex.parallel", "25.05 and older"),
    "SyncBatchNorm": ("apex.parallel", "25.05 and older, built with --cuda_ext"),
    "FusedSGD": ("apex.optimizers", "any version built with --cuda_ext"),
    "BatchNorm2d_NHWC": ("apex.contrib.groupbn", "versions built with --bnp"),
}


def piece(name: str) -> Any:
    """Import one of PIECES; raise ConfigError saying why it is missing and which builds of apex have it."""
    module, builds = PIECES[name]
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{module}.{name} cannot be imported ({error}). NVIDIA apex has it: {builds}. Build that from source "
            "(PyPI's `apex` is another project)"
        ) from error


def installed() -> dict[str, bool]:
    """Tell of each of PIECES whether it can be imported."""

    def is_there(name: str) -> bool:
        try:
            piece(name)
        except ConfigError:
            return False
        return True

    return {name: is_there(name) for name in PIECES}


class LARC:
    """Step weights under apex's LARC in scaling mode, biases and batch norm plainly, then move the targets.

    Not the paper's LARS: LARC divides by |g| + wd * |p| instead of |g + wd * p|. It reads every norm on the host, so it
    cannot be captured in a CUDA graph. Raises ConfigError where apex has no LARC.
    """

    def __init__(self, module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> None:
        weights, others = parameter_groups(module, weight_decay=config.weight_decay, trust=config.trust)
        adaptive = torch.optim.SGD(
            weights["params"], lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay
        )
        plain = torch.optim.SGD(others["params"], lr=0.0, momentum=config.momentum)
        self.optimizers = (piece("LARC")(adaptive, trust_coefficient=config.trust, clip=False, eps=0.0), plain)
        self.params, self.targets = list(target_of), list(target_of.values())
        device = weights["params"][0].device
        self.tau = torch.ones((), device=device)
        self._ema_rate = 1.0
        self.skipped = torch.zeros(2, dtype=torch.int32, device=device)  # LARC skips no step

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Give the momenta by parameter, as torch's optimisers do."""
        return {p: entry for optimizer in self.optimizers for p, entry in optimizer.state.items()}

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and the EMA rate for the next step."""
        self.tau.fill_(tau)
        self._ema_rate = tau
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        """Update momenta, parameters and targets in place (host sync for every tensor: LARC's)."""
        for optimizer in self.optimizers:
            optimizer.step()
        if self.targets:
            with torch.no_grad():
                reference.ema_(self.targets, self.params, tau=self._ema_rate)

    def state_dict(self) -> dict[str, Any]:
        """Gather the momenta, as plain values and tensors."""
        return {"adaptive": self.optimizers[0].state_dict(), "plain": self.optimizers[1].state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what state_dict gathered."""
        self.optimizers[0].load_state_dict(state["adaptive"])
        self.optimizers[1].load_state_dict(state["plain"])
