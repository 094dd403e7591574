"""Muon: steps along orthogonal momentum that keep the norm of each weight, with the EMA update of the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.errors import require
from fastbyol.kernels import reference
from fastbyol.optim.groups import configured_groups, gradient_of, set_lr

VECTOR_RATE = 10.0  # of biases and normalisation layers, over the weights' rate; 5 to 20 score alike, docs/quality.md
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024
TINY = torch.finfo(torch.float32).tiny


class Muon(torch.optim.Optimizer):
    """Muon that turns weights; each step also moves the EMA targets of the parameters.

    A weight is a matrix with a row for each output channel. Its Nesterov momentum is made orthogonal, and the weight
    moves along it by `lr` times its own norm, then takes its old norm again. Where batch norm or the loss's unit length
    follow, as in BYOL's ResNets, the norm changes nothing; elsewhere (VICReg, normalization none, transformers) a
    weight cannot grow. Biases and normalisation layers learn by SGD with the same momentum at VECTOR_RATE times the
    rate. Nothing decays: a decay would change the norm alone. A step with inf or NaN in any gradient changes nothing
    but `skipped`. Raises ConfigError for a weight of zeros, which has no norm to keep. No host sync in a step.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the norm is kept here as LARS reads it.
    """

    is_capturable = True
    skips_bad_steps = True
    needs_gradients = True

    def __init__(self, module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig) -> None:
        groups = [
            {"params": group["params"], "turns": group["trust"] is not None, "lr_scale": group["lr_scale"]}
            for group in configured_groups(module, config)
        ]
        for weight in (weight for group in groups if group["turns"] for weight in group["params"]):
            require(
                bool(weight.norm() > 0),
                f"optimizer muon keeps the norm of each weight, and one of shape {tuple(weight.shape)} is drawn as "
                "zeros; give optimizer lars or adamw",
            )
        parameters = [parameter for group in groups for parameter in group["params"]]
        device = parameters[0].device
        self.targets, self.followed = list(target_of.values()), list(target_of)
        self.momentum = config.momentum
        self.lr = torch.zeros((), device=device)  # a CUDA graph reads it
        self.tau = torch.ones((), dtype=torch.float64, device=device)
        self.skipped = torch.zeros(2, dtype=torch.int32, device=device)
        super().__init__(groups, {"lr": 0.0})
        for parameter in parameters:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles."""
        own = ("targets", "followed", "momentum", "lr", "tau", "skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and tau for the next step or CUDA graph replay."""
        self.lr.fill_(lr)
        self.tau.fill_(tau)
        set_lr(self.param_groups, lr)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update momenta, parameters and targets in place; return the closure's loss, if a closure is given.

        Raises MissingGradient for a parameter without a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
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
        for group in self.param_groups:
            move = _turn_all if group["turns"] else _move_all
            move(group["params"], updates, lr * group.get("lr_scale", 1.0))
        bad = (~is_good).to(torch.int32)
        self.skipped += bad
        self.skipped[1] *= bad
        if self.targets:
            reference.ema_(self.targets, self.followed, tau=torch.where(is_good, self.tau, 1.0))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that state_dict returned, in the memory order of the parameters."""
        super().load_state_dict(state_dict)
        self.lr.fill_(self.param_groups[0]["lr"])
        for parameter, state in self.state.items():
            state["momentum"] = torch.empty_like(parameter).copy_(state["momentum"])


def _turn_all(weights: list[nn.Parameter], updates: Mapping[nn.Parameter, Tensor], lr: Tensor) -> None:
    """Turn the weights, those of one shape at once."""
    alike: dict[tuple[int, int], list[nn.Parameter]] = {}
    for weight in weights:
        alike.setdefault((len(weight), weight[0].numel()), []).append(weight)
    for shape, group in alike.items():
        matrices = torch.stack([weight.reshape(shape) for weight in group])
        turned = turn(matrices, torch.stack([updates[weight].reshape(shape) for weight in group]), by=lr)
        for weight, matrix in zip(group, turned, strict=True):
            weight.copy_(matrix.view(weight.shape))


def _move_all(vectors: list[nn.Parameter], updates: Mapping[nn.Parameter, Tensor], lr: Tensor) -> None:
    for vector in vectors:
        vector.sub_(updates[vector] * (VECTOR_RATE * lr))


def turn(matrices: Tensor, updates: Tensor, *, by: Tensor) -> Tensor:
    """Return matrices [K, M, N] moved against their updates [K, M, N], made orthogonal, with their old norms.

    by: the length of the move in units of a matrix's norm, a scalar.
    """
    norms = _norm(matrices)
    moved = matrices - _unit(orthogonal(updates)) * (by * norms)
    return moved * (norms / _norm(moved).clamp_min(TINY))


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices [K, M, N] of any scale with singular values near 1, and zeros where all is zero.

    Singular values from a five-hundredth of the matrix's norm on become 0.68 to 1.21, smaller ones less. Computed in
    bfloat16 on a GPU, whose matrix units are fast in it. Source: Jordan et al. 2024, a quintic Newton-Schulz iteration.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]  # the products are of the shorter side, which costs less
    x = _unit(matrices)
    x = (x.mT if is_tall else x).to(torch.bfloat16 if x.is_cuda else x.dtype)
    # sixteen bits would lose the squares of small singular values
    x = _iterated(x) if x.dtype.itemsize == 2 else _factor(x @ x.mT) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def _iterated(x: Tensor) -> Tensor:
    """Return matrices [K, M, N] after the iteration x <- a x + b (x x') x + c (x x')^2 x."""
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        squared = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x


def _factor(squared: Tensor) -> Tensor:
    """Return the matrices [K, M, M] by which the iteration multiplies x in all, from squared = x x'.

    All of them are polynomials of `squared`, so they commute, and N enters but twice: half the time for N = 9 M.
    """
    a, b, c = QUINTIC
    factor = torch.eye(squared.shape[1], dtype=squared.dtype, device=squared.device).expand_as(squared)
    for left in reversed(range(ITERATIONS)):
        polynomial = torch.baddbmm(squared, squared, squared, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial @ factor
        if left:
            squared = polynomial @ squared @ polynomial
    return factor


def _unit(matrices: Tensor) -> Tensor:
    """Return matrices of norm 1, and zeros where all is zero."""
    matrices = matrices / matrices.abs().amax((1, 2), keepdim=True).clamp_min(TINY)  # or their squares were 0 or inf
    return matrices / _norm(matrices).clamp_min(TINY)


def _norm(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    return norms
