"""Know BYOL's networks: online (encoder, projector, predictor), target (encoder, projector), and what joins them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol import batchnorm
from fastbyol.batchnorm import BatchNormAct1d
from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig
from fastbyol.encoder import ResNet, build, init_
from fastbyol.kernels import reference
from fastbyol.kernels.ema_loss import Workspace, ema_loss
from fastbyol.objective import Objective

VIEWS = 2


class MLP(nn.Sequential):
    """Projector or predictor: depth - 1 times Linear(hidden, bias) -> BN -> ReLU, then Linear(out, no bias).

    [N, inputs] to [N, out]; a depth of 0 passes its input.
    """

    def __init__(self, inputs: int, config: HeadConfig, *, depth: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [
                nn.Linear(inputs, config.hidden),
                BatchNormAct1d(config.hidden, views=VIEWS),
                nn.Identity(),  # the ReLU's place: it happens in the batch norm, and the layers keep their names
            ]
            inputs = config.hidden
        if depth:
            layers.append(nn.Linear(inputs, config.out, bias=False))
        super().__init__(*layers)


class Branch(nn.Module):
    """Encoder and projector: what online and target share. Images [N, 3, H, W] to projections [N, D]."""

    def __init__(self, encoder: ResNet, projector: MLP) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to projections [N, D]."""
        projection: Tensor = self.projector(self.encoder(images))
        return projection


class Output(NamedTuple):
    """What one forward yields: the loss, a float32 scalar with its graph, and two that have none.

    Those are the projections predictions are compared with [2B, D], and the first view's representations [B, F].
    """

    loss: Tensor
    target_projections: Tensor
    representations: Tensor


class BYOL(nn.Module):
    """Online and target networks. The target starts as a copy, stays in train mode and never sees a gradient.

    Both weights depend only on (encoder, head, seed). The EMA that moves the target belongs to the optimiser, or with
    a lagged target to the loss. With target_statistics "running" the target's batch norms run in evaluation mode, on
    statistics that `follow_statistics` moves. Objectives whose targets are the online network's have no target network.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        head: HeadConfig,
        *,
        seed: int,
        target_statistics: str = "batch",
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.target_statistics = target_statistics
        resnet = build(encoder, seed=seed, views=VIEWS)
        projector = MLP(resnet.features, head, depth=head.projector_depth)
        predictor = MLP(head.out, head, depth=head.predictor_depth)
        generator = torch.Generator().manual_seed(seed + 1)
        init_(projector, generator)
        init_(predictor, generator)
        self.online = Branch(resnet, projector)
        self.predictor = predictor
        self.target = copy.deepcopy(self.online).requires_grad_(False) if objective.has_target else None
        self.objective = Objective(objective, dimensions=head.out, seed=seed + 2)
        self._workspace = Workspace()  # of a lagged target

    def forward(self, views: Tensor, *, tau: Tensor | None = None) -> Output:
        """Compute the loss of views [2B, 3, H, W], view-major (byol-spec, steps 1 and 2).

        With tau, a scalar on the views' device, the launch that computes the loss also moves the target towards the
        parameters of this forward: one step later than the paper.
        """
        goals = self._target_projections(views)  # first, while no activation is kept: its own are let go
        representations = self.online.encoder(views)
        projections = self.online.projector(representations)
        predictions = self.predictor(projections)
        if goals is None:
            goals = projections if self.objective.config.target == "online" else projections.detach()
        shown = representations.detach().chunk(VIEWS)[0]
        if tau is None:
            return Output(self.objective(predictions, goals), goals.detach(), shown)
        assert self.target is not None  # Recipe refuses a lagged target without one
        targets, params = list(self.target.parameters()), list(self.online.parameters())
        loss = ema_loss(predictions, goals, targets, params, tau=tau, workspace=self._workspace)
        return Output(loss, goals, shown)

    def _target_projections(self, views: Tensor) -> Tensor | None:
        """Project views by the target network [2B, D]; None where the objective has none."""
        if self.target is None:
            return None
        with torch.no_grad():
            projections: Tensor = self.target(views)
        return projections

    def train(self, mode: bool = True) -> BYOL:
        """Set the mode; a target on running statistics stays in evaluation mode."""
        super().train(mode)
        if self.target is not None:
            self.target.train(mode and self.target_statistics == "batch")
        return self

    def synchronize_(self, group: dist.ProcessGroup | None) -> None:
        """Share batch-norm statistics and negatives with the ranks of a group, which hold as many images each."""
        batchnorm.synchronize_(self, group)
        self.objective.group = group

    def follow_statistics(self, tau: Tensor) -> None:
        """Move the target's running statistics towards the online network's: an EMA at the rate of the weights."""
        assert self.target is not None  # Recipe refuses running statistics without one
        targets, sources = (
            [buffer for buffer in branch.buffers() if buffer.is_floating_point()]
            for branch in (self.target, self.online)
        )
        reference.ema_(targets, sources, tau=tau)

    def target_of(self) -> dict[nn.Parameter, Tensor]:
        """Pair every online parameter that has a target with that target tensor, for the EMA; {} where none moves."""
        if self.target is None or self.objective.config.target == "constant":
            return {}
        return dict(zip(self.online.parameters(), self.target.parameters(), strict=True))


def embedding_std(projections: Tensor) -> Tensor:
    """Measure collapse: the std over images of one view's unit-length projections, averaged over D; a scalar, no sync.

    projections [2B, D], view-major. About 1/sqrt(D) when healthy, 0 when every image maps to one point.
    """
    first = reference.normalize_rows(projections.chunk(VIEWS)[0].float())
    return first.std(0, correction=0).mean()
