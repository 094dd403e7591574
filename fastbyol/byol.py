"""Know BYOL's networks: online (encoder, projector, predictor), target (encoder, projector), and their loss."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbyol.batchnorm import BatchNormAct1d
from fastbyol.config import EncoderConfig, HeadConfig
from fastbyol.encoder import ResNet, build, init_
from fastbyol.kernels import reference
from fastbyol.kernels.byol_loss import byol_loss
from fastbyol.kernels.ema_loss import Workspace, ema_loss

VIEWS = 2


class MLP(nn.Sequential):
    """Projector or predictor: Linear(hidden, bias) -> BN -> ReLU -> Linear(out, no bias); [N, inputs] to [N, out]."""

    def __init__(self, inputs: int, config: HeadConfig) -> None:
        super().__init__(
            nn.Linear(inputs, config.hidden),
            BatchNormAct1d(config.hidden, views=VIEWS),
            nn.Identity(),  # the ReLU's place: it happens in the batch norm, and the layers keep their names
            nn.Linear(config.hidden, config.out, bias=False),
        )


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
    """What one forward yields: the loss, a float32 scalar with its graph, and the target's projections [2B, D]."""

    loss: Tensor
    target_projections: Tensor


class BYOL(nn.Module):
    """Online and target networks. The target starts as a copy, stays in train mode and never sees a gradient.

    Both weights depend only on (encoder, head, seed). The EMA that moves the target belongs to the optimiser, or with
    a lagged target to the loss. With target_statistics "running" the target's batch norms run in evaluation mode, on
    statistics that `follow_statistics` moves.
    """

    _ticket: Tensor

    def __init__(
        self, encoder: EncoderConfig, head: HeadConfig, *, seed: int, target_statistics: str = "batch"
    ) -> None:
        super().__init__()
        self.target_statistics = target_statistics
        resnet = build(encoder, seed=seed, views=VIEWS)
        projector, predictor = MLP(resnet.features, head), MLP(head.out, head)
        generator = torch.Generator().manual_seed(seed + 1)
        init_(projector, generator)
        init_(predictor, generator)
        self.online = Branch(resnet, projector)
        self.predictor = predictor
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.register_buffer("_ticket", torch.zeros(1, dtype=torch.int32), persistent=False)  # of the loss's launch
        self._workspace = Workspace()  # of a lagged target

    def forward(self, views: Tensor, *, tau: Tensor | None = None) -> Output:
        """Compute the loss of views [2B, 3, H, W], view-major (byol-spec, steps 1 and 2).

        With tau, a scalar on the views' device, the launch that computes the loss also moves the target towards the
        parameters of this forward: one step later than the paper.
        """
        predictions = self.predictor(self.online(views))
        with torch.no_grad():
            projections = self.target(views)
        if tau is None:
            return Output(byol_loss(predictions, projections, ticket=self._ticket), projections)
        targets, params = list(self.target.parameters()), list(self.online.parameters())
        loss = ema_loss(predictions, projections, targets, params, tau=tau, workspace=self._workspace)
        return Output(loss, projections)

    def train(self, mode: bool = True) -> BYOL:
        """Set the mode; a target on running statistics stays in evaluation mode."""
        super().train(mode)
        self.target.train(mode and self.target_statistics == "batch")
        return self

    def follow_statistics(self, tau: Tensor) -> None:
        """Move the target's running statistics towards the online network's: an EMA at the rate of the weights."""
        targets, sources = (
            [buffer for buffer in branch.buffers() if buffer.is_floating_point()]
            for branch in (self.target, self.online)
        )
        reference.ema_(targets, sources, tau=tau)

    def target_of(self) -> dict[nn.Parameter, Tensor]:
        """Pair every online parameter that has a target with that target tensor, for the EMA."""
        return dict(zip(self.online.parameters(), self.target.parameters(), strict=True))


def embedding_std(projections: Tensor) -> float:
    """Measure collapse: the std over images of one view's unit-length projections, averaged over D (host sync).

    projections [2B, D], view-major. About 1/sqrt(D) when healthy, 0 when every image maps to one point.
    """
    first = reference.normalize_rows(projections.chunk(VIEWS)[0].float())
    return first.std(0, correction=0).mean().item()
