"""AdamW by torch, for networks that LARS does not suit, with the EMA update of the target network in the same step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.kernels import reference
from fastbyol.optim.groups import configured_groups, set_lr

BETA2, EPS = 0.999, 1e-8  # torch's defaults, which the authors of MoCo v3 and DINO kept


class AdamW(torch.optim.AdamW):
    """AdamW; each step also moves the EMA targets of the parameters.

    Weights decay, and what parameter_groups leaves out does not. `momentum` of the configuration is beta 1. A step with
    inf or NaN in any gradient changes nothing but `skipped`. Source: Loshchilov and Hutter 2019.
    """

    is_capturable = True
    skips_bad_steps = True
    moments = 2  # of the gradient and of its square

    def __init__(self, module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> None:
        groups = configured_groups(module, config)
        device = next(p.device for group in groups for p in group["params"])
        self.params, self.targets = list(target_of), list(target_of.values())
        self.tau = torch.ones((), dtype=torch.float64, device=device)
        self.skipped = torch.zeros(2, dtype=torch.int32, device=device)
        # a CUDA graph reads them; on a CPU torch wants numbers
        self._lrs = [torch.zeros((), device=device) for _ in groups]
        super().__init__(groups, lr=0.0, betas=(config.momentum, BETA2), eps=EPS, fused=True, capturable=self._on_gpu)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles."""
        own = ("params", "targets", "tau", "skipped", "_lrs")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @property
    def _on_gpu(self) -> bool:
        return self._lrs[0].is_cuda

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and tau for the next step or CUDA graph replay."""
        self.tau.fill_(tau)
        set_lr(self.param_groups, lr)
        if self._on_gpu:
            for group, value in zip(self.param_groups, self._lrs, strict=True):
                group["lr"] = value.fill_(group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update moments, parameters and targets in place, without a host sync; return the closure's loss, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        is_good = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        self.found_inf = (~is_good).float()  # torch's fused kernel leaves everything as it is where this is 1
        super().step()
        bad = (~is_good).to(torch.int32)
        self.skipped += bad
        self.skipped[1] *= bad
        if self.targets:
            reference.ema_(self.targets, self.params, tau=torch.where(is_good, self.tau, 1.0))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that state_dict returned, in the memory order of the parameters, as the kernel wants it."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["capturable"] = self._on_gpu  # the state may be of another device
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(parameter).copy_(state[name])
