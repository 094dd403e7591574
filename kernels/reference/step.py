"""Normalised loss, LARS and the EMA target in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORM_EPS = 1e-12  # under the root of a squared norm (the authors' code)


def normalize_rows(x: Tensor) -> Tensor:
    """Scale rows [N, D] to unit length: x * rsqrt(max(sum(x^2), 1e-12)); a zero row stays zero."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(NORM_EPS).rsqrt()


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Compute BYOL's loss, the sum of both directions averaged over images, in [0, 8].

    q, z [2B, D]: online predictions and target projections, view-major; each row of q is compared with the row of z
    of the same image's other view. Computed in float32 at least. Source: paper, eq. 2; the authors' code for
    eps.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    other = torch.cat(z.detach().chunk(2)[::-1])
    difference = normalize_rows(q.to(wide)) - normalize_rows(other.to(wide))
    return difference.square().sum() / (q.shape[0] // 2)


class LarsRates(NamedTuple):
    """Settings of one group; a trust of None sets the ratio to 1, and tau is the EMA rate of its targets."""

    lr: float
    momentum: float
    weight_decay: float
    trust: float | None
    tau: float


class LarsGroup(NamedTuple):
    """Tensors with the same settings: parameters with their gradients, momenta and targets, None for no target."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momenta: Sequence[Tensor]
    targets: Sequence[Tensor | None]
    rates: LarsRates


def lars_ema_(groups: Sequence[LarsGroup], *, skipped: Tensor) -> None:
    """Take one LARS step and update the targets, or skip both if the norm of any gradient is inf or NaN.

    g <- g + wd*p;  ratio = trust*|p|/|g|, 1 where either norm is 0 or trust is None (biases and batch norm);
    u <- momentum*u + ratio*g;  p <- p - lr*u;  target <- tau*target + (1-tau)*p.
    skipped: [2] int32, counts the skipped steps, in total and in a row. Source: the authors' code; the skip is ours.
    """
    decayed = [torch._foreach_add(list(g.grads), list(g.params), alpha=g.rates.weight_decay) for g in groups]
    norms = [torch.stack(torch._foreach_norm(gradients)) for gradients in decayed]
    if not torch.cat(norms).isfinite().all():  # syncs
        skipped += 1
        return
    skipped[1] = 0
    for group, gradients, g_norms in zip(groups, decayed, norms, strict=True):
        lr, momentum, _, trust, tau = group.rates
        if trust is not None:
            p_norms = torch.stack(torch._foreach_norm(list(group.params)))
            ratios = torch.where((p_norms > 0) & (g_norms > 0), trust * p_norms / g_norms, 1.0)
            torch._foreach_mul_(gradients, list(ratios.unbind()))
        torch._foreach_mul_(list(group.momenta), momentum)
        torch._foreach_add_(list(group.momenta), gradients)
        torch._foreach_add_(list(group.params), list(group.momenta), alpha=-lr)
        pairs = [(target, p) for target, p in zip(group.targets, group.params, strict=True) if target is not None]
        if pairs:
            targets, followed = zip(*pairs, strict=True)
            ema_(targets, followed, tau=tau)


def ema_(targets: Sequence[Tensor], params: Sequence[Tensor], *, tau: float | Tensor) -> None:
    """Move targets towards params in place: xi <- tau*xi + (1-tau)*theta; tau in [0, 1], where 1 freezes and 0 copies.

    tau may be a scalar tensor on the targets' device, of float32 or, for an exact 1-tau, float64.
    """
    if isinstance(tau, Tensor):
        follow = (1 - tau).to(targets[0].dtype)
        torch._foreach_lerp_(list(targets), list(params), [follow] * len(targets))
    else:
        torch._foreach_lerp_(list(targets), list(params), 1 - tau)


def ema_loss(
    q: Tensor, z: Tensor, targets: Sequence[Tensor], params: Sequence[Tensor], *, tau: float | Tensor
) -> Tensor:
    """Compute byol_loss of q and z [2B, D] and move the targets, from which z was computed, towards params.

    The params are still those of this step, so the target is one step behind that of `lars_ema_`.
    """
    with torch.no_grad():
        ema_(targets, params, tau=tau)
    return byol_loss(q, z)
