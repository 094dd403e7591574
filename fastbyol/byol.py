"""Know BYOL's networks: online (encoder, projector, predictor), target (encoder, projector), and their loss."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbyol.batchnorm import BatchNorm1d
from fastbyol.config import EncoderConfig, HeadConfig
from fastbyol.encoder import ResNet, build, init_
from fastbyol.kernels import reference

VIEWS = 2


class MLP(nn.Sequential):
    """Projector or predictor: Linear(hidden, bias) -> BN -> ReLU -> Linear(out, no bias); [N, inputs] to [N, out]."""

    def __init__(self, inputs: int, config: HeadConfig) -> None:
        super().__init__(
            nn.Linear(inputs, config.hidden),
            BatchNorm1d(config.hidden, views=VIEWS),
            nn.ReLU(inplace=True),
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

    Both weights depend only on (encoder, head, seed). The EMA that moves the target belongs to the optimiser.
    """

    def __init__(self, encoder: EncoderConfig, head: HeadConfig, *, seed: int) -> None:
        super().__init__()
        resnet = build(encoder, seed=seed, views=VIEWS)
        projector, predictor = MLP(resnet.features, head), MLP(head.out, head)
        generator = torch.Generator().manual_seed(seed + 1)
        init_(projector, generator)
        init_(predictor, generator)
        self.online = Branch(resnet, projector)
        self.predictor = predictor
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, views: Tensor) -> Output:
        """Compute the loss of views [2B, 3, H, W], view-major (byol-spec, steps 1 and 2)."""
        predictions = self.predictor(self.online(views))
        with torch.no_grad():
            projections = self.target(views)
        return Output(reference.byol_loss(predictions, projections), projections)

    def target_of(self) -> dict[nn.Parameter, Tensor]:
        """Pair every online parameter that has a target with that target tensor, for the EMA."""
        return dict(zip(self.online.parameters(), self.target.parameters(), strict=True))


def embedding_std(projections: Tensor) -> float:
    """Measure collapse: the std over images of one view's unit-length projections, averaged over D (host sync).

    projections [2B, D], view-major. About 1/sqrt(D) when healthy, 0 when every image maps to one point.
    """
    first = reference.normalize_rows(projections.chunk(VIEWS)[0].float())
    return first.std(0, correction=0).mean().item()
