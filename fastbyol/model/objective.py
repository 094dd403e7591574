"""Training losses: BYOL's distance to an image's other projections, and a contrastive term for negatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol.config import ObjectiveConfig
from fastbyol.kernels.byol_loss import byol_loss
from fastbyol.kernels.reference import NORM_EPS, normalize_rows
from fastbyol.model.batchnorm import TakesViews


def normalize(x: Tensor, normalization: str, *, views: int = 2) -> Tensor:
    """Normalise rows [V*B, D], view-major; all but "none" give a mean squared length of 1.

    "l2": unit length; "layernorm": unit length after subtracting the row's mean; "batchnorm": mean 0 and variance 1 / D
    in each dimension over the B rows of a view in this process. Source: paper, appendix F.6.
    """
    if normalization == "l2":
        return normalize_rows(x)
    if normalization == "layernorm":
        return normalize_rows(x - x.mean(1, keepdim=True))
    if normalization == "batchnorm":
        by_view = x.reshape(views, -1, x.shape[1])
        centred = by_view - by_view.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        return (centred * (variance.clamp_min(NORM_EPS) * x.shape[1]).rsqrt()).reshape(x.shape)
    return x


def attraction(q: Tensor, z: Tensor, *, views: int = 2, normalization: str = "l2") -> Tensor:
    """Compute the squared distance of predictions q to the other views' projections z, both [V*B, D], view-major.

    A view's prediction is compared with the mean of the image's other projections, normalised each. Twice the mean over
    views and images, in float32 at least: with two views the sum of both directions, which with l2 and a z without
    gradient equals byol_loss. Gradients reach q and z. Source: paper, eq. 2 and appendix F.6; for more than two views
    Pototzky et al. 2022.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    other = mean_of_others(normalize(z.to(wide), normalization, views=views), views=views)
    return (normalize(q.to(wide), normalization, views=views) - other).square().sum() / (len(q) / 2)


def local_attraction(q: Tensor, z: Tensor, *, views: int, normalization: str = "l2") -> Tensor:
    """Compute the squared distance of local views' predictions q [L*B, D] to the projections z [V*B, D] of all views.

    Each is compared with the mean of the image's normalised projections. Twice the mean over local views and images, in
    float32 at least, so that one prediction weighs as one of attraction. Source: SwAV, Caron et al. 2020.
    """
    wide, images = torch.promote_types(q.dtype, torch.float32), len(z) // views
    means = normalize(z.to(wide), normalization, views=views).reshape(views, images, -1).mean(0)
    rows = normalize(q.to(wide), normalization, views=len(q) // images).reshape(-1, images, q.shape[1])
    return (rows - means).square().sum() / (len(q) / 2)


def mean_of_others(rows: Tensor, *, views: int) -> Tensor:
    """Return for each of the rows [V*B, D], view-major, the mean of those of the same image's other views, [V*B, D]."""
    by_view = rows.reshape(views, -1, rows.shape[1])
    # a mean of rolls, not a sum less the own row: with two views the other row to the bit
    return torch.stack([by_view.roll(shift, 0) for shift in range(1, views)]).mean(0).flatten(0, 1)


def repulsion(
    q: Tensor, z: Tensor, *, temperature: float, decoupled: bool = False, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute the similarity of predictions q to all projections z except their own, both [2B, D], view-major.

    decoupled: also except the one of the image's other view (arXiv 2110.06848).

    2 * temperature times the mean over images of ln sum exp(cosine / temperature), summed over both directions, in
    float32 at least. With a group, z is gathered from all its ranks, equally many rows on each. Gradients reach q and
    z, on other ranks too. Source: paper, eq. 6 and appendix F.4, which subtract it from an objective to maximise.
    """
    keys, first = normalize_rows(at_least_float32(z)), 0
    if group is not None:
        first = dist.get_rank(group) * len(keys)
        keys = gather_rows(keys, group)
    similarities = normalize_rows(at_least_float32(q)) @ keys.T / temperature
    rows = torch.arange(len(q), device=q.device)
    left_out = [rows, (rows + len(q) // 2) % len(q)] if decoupled else [rows]
    columns = first + torch.stack(left_out, 1)
    return _sum_of_logsumexp(similarities.scatter(1, columns, -torch.inf), temperature)


def queue_repulsion(q: Tensor, z: Tensor, queue: Tensor, *, temperature: float, decoupled: bool = False) -> Tensor:
    """Compute repulsion against a queue [K, D] of unit rows and, unless decoupled, the other view's projection.

    Source: He et al. 2020, eq. 1, for both directions.
    """
    queries = normalize_rows(at_least_float32(q))
    if decoupled:
        return _sum_of_logsumexp(queries @ queue.T / temperature, temperature)
    positives = torch.cat(normalize_rows(at_least_float32(z)).chunk(2)[::-1])
    nearest = torch.cat([(queries * positives).sum(1, keepdim=True), queries @ queue.T], 1)
    return _sum_of_logsumexp(nearest / temperature, temperature)


def _sum_of_logsumexp(scaled: Tensor, temperature: float) -> Tensor:
    return 2 * temperature * scaled.logsumexp(1).sum() / (scaled.shape[0] // 2)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is where its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _AllGather(torch.autograd.Function):
    """All-gather of rows in rank order; the gradient of a rank's rows is summed over all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(rows)
        gathered = rows.new_empty(dist.get_world_size(group) * len(rows), rows.shape[1])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(
            memory_format=torch.contiguous_format
        )  # all_reduce works in place, and autograd owns the original
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group) * ctx.count :][: ctx.count], None


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the rows [N, D] of all ranks, equally many on each, in rank order; the gradient reaches every rank's."""
    gathered: Tensor = _AllGather.apply(rows, group)  # type: ignore[no-untyped-call]
    return gathered


class Objective(nn.Module, TakesViews):
    """The loss of an ObjectiveConfig: attraction + beta * repulsion, with the beta of the last set_beta.

    Without negatives and with l2 it lies in [0, 8], whatever the number of views, which is two unless set_views_ has
    changed it; the negatives are of two views. With beta 1 it is 4 + 4 * temperature times SimCLR's loss or, with
    a queue, MoCo's. The queue [K, D] is part of the state: random unit rows from the seed at first, then the newest K
    target projections, gathered from all ranks if `group` is set.
    """

    _ticket: Tensor
    beta: Tensor
    queue: Tensor
    queue_next: Tensor

    def __init__(self, config: ObjectiveConfig, *, dimensions: int, seed: int) -> None:
        super().__init__()
        self.config, self.views = config, 2
        self.group: dist.ProcessGroup | None = None
        self.register_buffer("_ticket", torch.zeros(1, dtype=torch.int32), persistent=False)  # for the loss kernel
        self.register_buffer("beta", torch.tensor(config.beta, dtype=torch.float64), persistent=False)
        if config.queue:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randn(config.queue, dimensions, generator=generator)
            self.register_buffer("queue", normalize_rows(rows))
            self.register_buffer("queue_next", torch.zeros((), dtype=torch.int64))

    def set_beta(self, beta: float) -> None:
        """Set the weight of the negatives for the next step, on the device: a captured graph reads it there."""
        self.beta.fill_(beta)

    def forward(self, q: Tensor, z: Tensor, local: Tensor | None = None) -> Tensor:
        """Compute the loss of predictions q and projections z [V*B, D], view-major; in training enqueue z.

        local: predictions of local views [L*B, D], each of which weighs as much as one of q.
        """
        loss = self._of_global_views(q, z)
        if local is None:
            return loss
        with torch.autocast(q.device.type, enabled=False):
            of_local = local_attraction(local, z, views=self.views, normalization=self.config.normalization)
        share = len(local) / (len(q) + len(local))
        return (1 - share) * loss + share * of_local

    def _of_global_views(self, q: Tensor, z: Tensor) -> Tensor:
        config = self.config
        is_attraction_fused = self.views == 2 and config.normalization == "l2" and config.target != "online"
        if is_attraction_fused and not config.beta:
            return byol_loss(q, z, ticket=self._ticket)
        with torch.autocast(q.device.type, enabled=False):  # bfloat16 would round cosines to hundredths
            if is_attraction_fused:
                loss = byol_loss(q, z, ticket=self._ticket)
            else:
                loss = attraction(q, z, views=self.views, normalization=config.normalization)
            if config.queue:
                queue = self.queue.clone()  # the backward reads it after z is enqueued
                loss = loss + self.beta.to(loss.dtype) * queue_repulsion(
                    q, z, queue, temperature=config.temperature, decoupled=config.decoupled
                )
                if self.training:
                    self._enqueue(z)
            elif config.beta:
                loss = loss + self.beta.to(loss.dtype) * repulsion(
                    q, z, temperature=config.temperature, decoupled=config.decoupled, group=self.group
                )
        return loss

    @torch.no_grad()
    def _enqueue(self, z: Tensor) -> None:
        """Replace the oldest rows by projections z, unless any of z is inf or NaN. No host sync."""
        keys = normalize_rows(at_least_float32(z)).to(self.queue.dtype)
        if self.group is not None:
            keys = gather_rows(keys, self.group)
        places = (self.queue_next + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = torch.where(keys.isfinite().all(), keys, self.queue[places])
        self.queue_next.copy_((self.queue_next + len(keys)) % len(self.queue))
