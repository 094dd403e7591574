"""Muon: steps along orthogonal momentum that keep the norm of each weight, with the EMA update of the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import overload

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.errors import require
from fastbyol.kernels import reference
from fastbyol.optim import gradient_of, parameter_groups

VECTOR_RATE = 10.0  # of biases and norms, over the weights' rate; 3 to 20 score alike, docs/quality.md
ITERATIONS = 5
TINY = torch.finfo(torch.float32).tiny
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: singular values of 0.001 to 1 become 0.7 to 1.2


class Muon(torch.optim.Optimizer):
    """Muon that rotates weights; each step also moves the EMA targets of the parameters.

    A weight is a matrix of an output channel a row. Its Nesterov momentum is made orthogonal and scaled to the weight's
    norm, so that the rate is the length of a step in units of that norm, as LARS's trust is; then the weight takes its
    norm of before. What comes before a norm, as everything in BYOL's ResNets does, is not changed by its scale.
    Biases and norms learn by SGD with the same momentum at VECTOR_RATE times the rate. Nothing decays: a decay would
    change the norm alone. A step with inf or NaN in any gradient changes nothing but `skipped`.
    Raises ConfigError for a weight of zeros, which has no norm to keep. No host sync in a step.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; its first code kept the norms, too.
    """

    is_capturable = True
    skips_bad_steps = True

    def __init__(self, module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> None:
        super().__init__(parameter_groups(module, weight_decay=0.0, trust=config.trust), {"lr": 0.0})
        weights, vectors = (group["params"] for group in self.param_groups)
        self.vectors: list[nn.Parameter] = vectors
        self.alike: dict[tuple[int, int], list[nn.Parameter]] = {}  # weights by the shape of their matrices
        for weight in weights:
            require(
                bool(weight.any()),
                f"optimizer muon keeps the norm of each weight, and one of shape {tuple(weight.shape)} is drawn as "
                "zeros; give optimizer lars or adamw",
            )
            self.alike.setdefault((len(weight), weight[0].numel()), []).append(weight)
        self.targets, self.followed = list(target_of.values()), list(target_of)
        device = (weights or vectors)[0].device
        self.momentum = config.momentum
        self.lr = torch.zeros((), device=device)  # a CUDA graph reads it
        self.tau = torch.ones((), dtype=torch.float64, device=device)
        self.skipped = torch.zeros(2, dtype=torch.int32, device=device)
        for parameter in self._parameters:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [*chain.from_iterable(self.alike.values()), *self.vectors]

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and tau for the next step or CUDA graph replay."""
        self.lr.fill_(lr)
        self.tau.fill_(tau)
        for group in self.param_groups:
            group["lr"] = lr

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update momenta, parameters and targets in place; return the closure's loss, if a closure is given.

        Raises RuntimeError for a parameter without a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters
        gradients = [gradient_of(parameter) for parameter in parameters]
        is_good = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        # with gradients of 0, momenta that stay and a rate of 0, all of the below changes nothing
        gradients = [torch.where(is_good, gradient, 0.0) for gradient in gradients]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, torch.where(is_good, self.momentum, 1.0))
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=self.momentum)
        updates = dict(zip(parameters, ahead, strict=True))
        lr = self.lr * is_good
        for shape, weights in self.alike.items():
            matrices = torch.stack([weight.reshape(shape) for weight in weights])
            rotated = rotate(matrices, torch.stack([updates[weight].reshape(shape) for weight in weights]), by=lr)
            for weight, matrix in zip(weights, rotated, strict=True):
                weight.copy_(matrix.view(weight.shape))
        for vector in self.vectors:
            vector.sub_(updates[vector] * (VECTOR_RATE * lr))
        bad = (~is_good).to(torch.int32)
        self.skipped += bad
        self.skipped[1] *= bad
        if self.targets:
            reference.ema_(self.targets, self.followed, tau=torch.where(is_good, self.tau, 1.0))
        return loss


def rotate(matrices: Tensor, updates: Tensor, *, by: Tensor) -> Tensor:
    """Return matrices [K, M, N], moved against orthogonal updates by `by`, a scalar, times their norms, norms kept."""
    updates = orthogonal(updates)
    norms, lengths = (_norm(each) for each in (matrices, updates))
    moved = matrices - updates * (by * norms / lengths.clamp_min(TINY))
    return moved * (norms / _norm(moved))


def _norm(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    return norms


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices [K, M, N] of any scale with singular values near 1, and zeros where all is zero.

    Singular values of a thousandth of the matrix's norm and more become 0.7 to 1.2, smaller ones less. Computed in
    bfloat16 on a GPU, whose matrix units are fast in it. Source: Jordan et al. 2024, a quintic Newton-Schulz iteration.
    """
    a, b, c = QUINTIC
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices / _norm(matrices).clamp_min(TINY)
    x = (x.mT if is_tall else x).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(ITERATIONS):
        squared = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
