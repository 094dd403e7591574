"""BYOL's step as plain torch code has it: a forward per view, one operation after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol import optim
from fastbyol.config import OptimConfig
from fastbyol.model.batchnorm import EPS, MOMENTUM, BatchNormAct1d, BatchNormAct2d, BatchNormAddReLU2d
from fastbyol.model.byol import BYOL, Output
from fastbyol.model.resnet import NormedMaxPool, StemConv2d


def norm_relu(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Normalise one view in training, add, pass through ReLU; moves mean and var."""
    y = F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)
    return F.relu_(y if residual is None else y + residual)


def loss(q: Tensor, z: Tensor) -> Tensor:
    """Compute the loss by cosines, 2 - 2 cos a direction; q, z [2B, D], view-major."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (q1, q2), (z1, z2) = q.to(wide).chunk(2), z.to(wide).chunk(2)
    return (4 - 2 * F.cosine_similarity(q1, z2) - 2 * F.cosine_similarity(q2, z1)).mean()


class BatchNorm(nn.Module):
    """A stand-in for one of fastbyol's batch norms, on the same parameters and statistics, one view a call."""

    def __init__(self, ours: BatchNormAct1d | BatchNormAct2d | BatchNormAddReLU2d) -> None:
        super().__init__()
        self.weight, self.bias, self.mean, self.var = ours.weight, ours.bias, ours.running_mean, ours.running_var
        self.has_relu = isinstance(ours, BatchNormAddReLU2d) or ours.relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise [B, C, ...]; with a residual return the result for both of its consumers."""
        assert self.mean is not None
        assert self.var is not None
        if not self.has_relu:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, True, MOMENTUM, EPS)
        z = norm_relu(x, residual, self.weight, self.bias, self.mean, self.var)
        return z if residual is None else (z, z)


class Convolution(nn.Module):
    """A stand-in for the stem's convolution, on the same weight."""

    def __init__(self, ours: StemConv2d) -> None:
        super().__init__()
        self.weight = ours.weight

    def forward(self, images: Tensor) -> Tensor:
        """Convolve images [N, 3, H, W]."""
        return F.conv2d(images, self.weight, stride=2, padding=3)


class MaxPool(nn.Module):
    """A stand-in for the stem's pooling, for both of its consumers."""

    def forward(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Normalise, then pool [N, C, H, W]."""
        z = F.max_pool2d(norm(x), 3, 2, 1)
        return z, z


def replace_(module: nn.Module) -> None:
    """Replace every batch norm inside the module, the stem's convolution and its pooling by the stand-ins."""
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct1d | BatchNormAct2d | BatchNormAddReLU2d):
            setattr(module, name, BatchNorm(child))
        elif isinstance(child, StemConv2d):
            setattr(module, name, Convolution(child))
        elif isinstance(child, NormedMaxPool):
            setattr(module, name, MaxPool())
        else:
            replace_(child)


class PerView(nn.Module):
    """Compute BYOL's loss with one forward per view, for an engine of fastbyol.train.step in the place of the model."""

    def __init__(self, byol: BYOL) -> None:
        super().__init__()
        replace_(byol)
        self.byol = byol

    def forward(self, views: Tensor, *, tau: Tensor | None = None) -> Output:
        """Take views [2B, 3, H, W]; tau belongs to the optimiser here."""
        assert tau is None
        parts = views.chunk(2)
        representations = [self.byol.online.encoder(part) for part in parts]
        predictions = torch.cat([self.byol.predictor(self.byol.online.projector(y)) for y in representations])
        with torch.no_grad():
            projections = torch.cat([self.byol.target(part) for part in parts])
        return Output(loss(predictions, projections), projections, representations[0].detach())


class Group(NamedTuple):
    """List tensors under the same settings, with momenta, and targets where all have one (else an empty list)."""

    params: list[nn.Parameter]
    momenta: list[Tensor]
    targets: list[Tensor]
    weight_decay: float
    trust: float | None
    lr_scale: float


class LARS:
    """Step and follow as fastbyol's LARS does, by a function over tensors and rates; it never skips a step."""

    def __init__(self, model: BYOL, config: OptimConfig, step: Callable[..., None]) -> None:
        target_of, self.momentum, self._step = model.target_of(), config.momentum, step
        self.groups = []
        for group in optim.configured_groups(model, config):
            for is_followed in (True, False):
                params = [p for p in group["params"] if (p in target_of) == is_followed]
                momenta = [torch.zeros_like(p) for p in params]
                targets = [target_of[p] for p in params] if is_followed else []
                settings = (group["weight_decay"], group["trust"], group["lr_scale"])
                self.groups.append(Group(params, momenta, targets, *settings))
        self.set_rates(lr=0.0, tau=1.0)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for group in self.groups:
            for parameter in group.params:
                parameter.grad = None

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate and the EMA rate."""
        self.lr, self.tau = lr, tau

    @torch.no_grad()
    def step(self) -> None:
        """Update momenta, parameters and targets."""
        self._step(self.groups, lr=self.lr, momentum=self.momentum, tau=self.tau)


def lars_loop_(groups: Iterable[Group], *, lr: float, momentum: float, tau: float) -> None:
    """Take the step tensor by tensor, the formula word for word."""
    for params, momenta, targets, weight_decay, trust, lr_scale in groups:
        for index, (p, u) in enumerate(zip(params, momenta, strict=True)):
            assert p.grad is not None
            g = p.grad + weight_decay * p
            if trust is not None:
                p_norm, g_norm = p.norm(), g.norm()
                g = g * torch.where((p_norm > 0) & (g_norm > 0), trust * p_norm / g_norm, 1.0)
            u.mul_(momentum).add_(g)
            p.sub_(u, alpha=lr * lr_scale)
            if targets:
                targets[index].mul_(tau).add_(p, alpha=1 - tau)


def lars_foreach_(groups: Iterable[Group], *, lr: float, momentum: float, tau: float) -> None:
    """Take the step with torch's operations over lists of tensors."""
    for params, momenta, targets, weight_decay, trust, lr_scale in groups:
        if not params:
            continue
        gradients = torch._foreach_add([p.grad for p in params], params, alpha=weight_decay)
        if trust is not None:
            p_norms, g_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, gradients))
            ratios = torch.where((p_norms > 0) & (g_norms > 0), trust * p_norms / g_norms, 1.0)
            torch._foreach_mul_(gradients, list(ratios.unbind()))
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        torch._foreach_add_(params, momenta, alpha=-lr * lr_scale)
        if targets:
            torch._foreach_lerp_(targets, params, 1 - tau)
