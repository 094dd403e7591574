"""Optional NVIDIA apex: which of its pieces are installed, and BYOL trained with apex's LARC.

apex removes pieces from release to release, so each is found by importing it. It is never required.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.kernels import reference
from fastbyol.optim import configured_groups, set_lr

PIECES = {  # module, and the builds of apex that have it
    "LARC": ("apex.parallel", "25.05 and older"),
    "SyncBatchNorm": ("apex.parallel", "25.05 and older, built with --cuda_ext"),
    "FusedSGD": ("apex.optimizers", "any version built with --cuda_ext"),
    "BatchNorm2d_NHWC": ("apex.contrib.groupbn", "versions built with --bnp"),
}


def import_piece(name: str) -> Any:
    """Import one of PIECES; raise ConfigError with the reason if it is missing, and with the builds that have it."""
    module, builds = PIECES[name]
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{module}.{name} cannot be imported ({error}); NVIDIA apex has it in {builds}; build that from source "
            "(PyPI's `apex` is another project)"
        ) from error


def find_installed() -> dict[str, bool]:
    """Map each of PIECES to whether it can be imported."""

    def can_import(name: str) -> bool:
        try:
            import_piece(name)
        except ConfigError:
            return False
        return True

    return {name: can_import(name) for name in PIECES}


class LARC:
    """apex's LARC in scaling mode for weights, SGD for biases and batch norm; each step also moves the targets.

    This is not the paper's LARS: LARC divides by |g| + wd * |p| instead of |g + wd * p|. It reads every norm on the
    host, so it cannot be captured in a CUDA graph. Raises ConfigError if apex or its LARC is missing.
    """

    is_capturable = False
    skips_bad_steps = False

    def __init__(self, module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> None:
        groups = configured_groups(module, config)
        weights = [group for group in groups if group["trust"] is not None]
        others = [group for group in groups if group["trust"] is None]
        adaptive = torch.optim.SGD(weights, lr=0.0, momentum=config.momentum)
        plain = torch.optim.SGD(others, lr=0.0, momentum=config.momentum)
        self.optimizers = (import_piece("LARC")(adaptive, trust_coefficient=config.trust, clip=False, eps=0.0), plain)
        self.params, self.targets = list(target_of), list(target_of.values())
        device = next(p.device for group in groups for p in group["params"])
        self.tau = torch.ones((), device=device)
        self._tau = 1.0
        self.skipped = torch.zeros(2, dtype=torch.int32, device=device)

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """The momenta by parameter, as in torch's optimisers."""
        return {p: entry for optimizer in self.optimizers for p, entry in optimizer.state.items()}

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and tau for the next step."""
        self.tau.fill_(tau)
        self._tau = tau
        for optimizer in self.optimizers:
            set_lr(optimizer.param_groups, lr)

    def step(self) -> None:
        """Update momenta, parameters and targets in place. LARC syncs with the host for every tensor."""
        for optimizer in self.optimizers:
            optimizer.step()
        if self.targets:
            with torch.no_grad():
                reference.ema_(self.targets, self.params, tau=self._tau)

    def state_dict(self) -> dict[str, Any]:
        """Return the momenta as plain values and tensors."""
        return {"adaptive": self.optimizers[0].state_dict(), "plain": self.optimizers[1].state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that state_dict returned."""
        self.optimizers[0].load_state_dict(state["adaptive"])
        self.optimizers[1].load_state_dict(state["plain"])
