"""Know what is minimised: how far a prediction lies from the other view's projection, how near to other images'."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol.config import ObjectiveConfig
from fastbyol.kernels.byol_loss import byol_loss
from fastbyol.kernels.reference import NORM_EPS, normalize_rows


def normalized(x: Tensor, normalization: str) -> Tensor:
    """Make rows [2B, D], view-major, comparable; each but "none" leaves them a mean squared length of 1.

    "l2": unit length; "layernorm": the same after the row's mean is taken off; "batchnorm": mean 0 and variance 1 / D
    of each dimension over a view's B rows of this process. Source: paper, appendix F.6.
    """
    if normalization == "l2":
        return normalize_rows(x)
    if normalization == "layernorm":
        return normalize_rows(x - x.mean(1, keepdim=True))
    if normalization == "batchnorm":
        views = x.reshape(2, -1, x.shape[1])
        centred = views - views.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        return (centred * (variance.clamp_min(NORM_EPS) * x.shape[1]).rsqrt()).reshape(x.shape)
    return x


def attraction(q: Tensor, z: Tensor, *, normalization: str = "l2") -> Tensor:
    """Measure the squared distance of predictions q from projections z of the other view, both [2B, D], view-major.

    The sum of both directions, averaged over images, in float32 at least; for l2 and a z without gradient it is
    byol_loss. Gradients reach both. Source: paper, eq. 2 and appendix F.6.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    other = torch.cat(normalized(z.to(wide), normalization).chunk(2)[::-1])
    return (normalized(q.to(wide), normalization) - other).square().sum() / (q.shape[0] // 2)


def repulsion(q: Tensor, z: Tensor, *, temperature: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Measure how near predictions q come to all projections z but their own view's, both [2B, D], view-major.

    2 * temperature times the sum of both directions' mean of ln sum exp(cosine / temperature), in float32 at least.
    With a group the projections are those of all its ranks, as many on each. Gradients reach both, on other ranks too.
    Source: paper, eq. 6 and appendix F.4, where it is subtracted from what is maximised.
    """
    keys, first = normalize_rows(_wide(z)), 0
    if group is not None:
        first = dist.get_rank(group) * len(keys)
        keys = _gathered(keys, group)
    similarities = normalize_rows(_wide(q)) @ keys.T / temperature
    own = first + torch.arange(len(q), device=q.device)
    return _log_sums(similarities.scatter(1, own[:, None], -torch.inf), temperature)


def queue_repulsion(q: Tensor, z: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Measure as repulsion, but against the other view's projection and a queue [K, D] of unit rows.

    Source: He et al. 2020, eq. 1, for both directions.
    """
    queries = normalize_rows(_wide(q))
    positives = torch.cat(normalize_rows(_wide(z)).chunk(2)[::-1])
    nearest = torch.cat([(queries * positives).sum(1, keepdim=True), queries @ queue.T], 1)
    return _log_sums(nearest / temperature, temperature)


def _log_sums(scaled: Tensor, temperature: float) -> Tensor:
    return 2 * temperature * scaled.logsumexp(1).sum() / (scaled.shape[0] // 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Gathered(torch.autograd.Function):
    """Join the rows of all ranks, in order of rank; the gradient of a rank's rows is the sum over all ranks'."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(rows)
        joined = rows.new_empty(dist.get_world_size(group) * len(rows), rows.shape[1])
        dist.all_gather_into_tensor(joined, rows.contiguous(), group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)  # the sum overwrites it; autograd's is not ours
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group) * ctx.count :][: ctx.count], None


def _gathered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    joined: Tensor = _Gathered.apply(rows, group)  # type: ignore[no-untyped-call]
    return joined


class Objective(nn.Module):
    """Compute the loss that a configuration asks for: attraction + beta * repulsion.

    Without negatives it lies in [0, 8] for l2; with beta 1 it is 4 + 4 * temperature times SimCLR's loss or, with a
    queue, MoCo's. The queue [K, D] is part of the state: random unit rows at first, from the seed alone, then the
    newest K projections of the target, those of all ranks where `group` is set.
    """

    _ticket: Tensor
    queue: Tensor
    queue_next: Tensor

    def __init__(self, config: ObjectiveConfig, *, dimensions: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.group: dist.ProcessGroup | None = None
        self.register_buffer("_ticket", torch.zeros(1, dtype=torch.int32), persistent=False)  # of the loss's launch
        if config.queue:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randn(config.queue, dimensions, generator=generator)
            self.register_buffer("queue", normalize_rows(rows))
            self.register_buffer("queue_next", torch.zeros((), dtype=torch.int64))

    def forward(self, q: Tensor, z: Tensor) -> Tensor:
        """Compute the loss of predictions q and projections z [2B, D], view-major; in training z enters the queue."""
        config = self.config
        is_attraction_fused = config.normalization == "l2" and config.target != "online"
        if is_attraction_fused and not config.beta:
            return byol_loss(q, z, ticket=self._ticket)
        with torch.autocast(q.device.type, enabled=False):  # cosines in bfloat16 would be whole hundredths
            if is_attraction_fused:
                loss = byol_loss(q, z, ticket=self._ticket)
            else:
                loss = attraction(q, z, normalization=config.normalization)
            if config.queue:
                queue = self.queue.clone()  # the backward reads it after z has entered
                loss = loss + config.beta * queue_repulsion(q, z, queue, temperature=config.temperature)
                if self.training:
                    self._enter(z)
            elif config.beta:
                loss = loss + config.beta * repulsion(q, z, temperature=config.temperature, group=self.group)
        return loss

    @torch.no_grad()
    def _enter(self, z: Tensor) -> None:
        """Let projections take the places of the oldest, without a host sync; not if any of them is inf or NaN."""
        keys = normalize_rows(_wide(z)).to(self.queue.dtype)
        if self.group is not None:
            keys = _gathered(keys, self.group)
        places = (self.queue_next + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = torch.where(keys.isfinite().all(), keys, self.queue[places])
        self.queue_next.copy_((self.queue_next + len(keys)) % len(self.queue))
