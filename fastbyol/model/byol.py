"""BYOL's networks: online (encoder, projector, predictor) and target (encoder, projector), and their forward."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig
from fastbyol.errors import require
from fastbyol.kernels import reference
from fastbyol.kernels.ema_loss import Workspace, ema_loss
from fastbyol.model import batchnorm
from fastbyol.model.batchnorm import BatchNormAct1d
from fastbyol.model.objective import Objective
from fastbyol.model.parts import Encoder, build_encoder, build_objective
from fastbyol.model.resnet import init_

VIEWS = 2  # of an image, unless a recipe has more


class MLP(nn.Sequential):
    """Projector or predictor: depth - 1 times Linear(hidden, bias) -> BN -> ReLU, then Linear(out, no bias).

    Maps [N, inputs] to [N, out]; depth 0 is the identity.
    """

    def __init__(self, inputs: int, config: HeadConfig, *, depth: int, views: int = VIEWS) -> None:
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [
                nn.Linear(inputs, config.hidden),
                BatchNormAct1d(config.hidden, views=views),
                nn.Identity(),  # stands for the ReLU, which the batch norm computes: layers keep their numbers
            ]
            inputs = config.hidden
        if depth:
            layers.append(nn.Linear(inputs, config.out, bias=False))
        super().__init__(*layers)


class Branch(nn.Module):
    """Encoder and projector, the part that online and target network have in common."""

    def __init__(self, encoder: Encoder, projector: MLP) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to projections [N, D]."""
        projection: Tensor = self.projector(self.encoder(images))
        return projection


class Output(NamedTuple):
    """The result of one forward: the loss, a float32 scalar, and two detached tensors.

    target_projections [V*B, D]: what the predictions are compared with; representations [B, F]: the first view's.
    """

    loss: Tensor
    target_projections: Tensor
    representations: Tensor


class BYOL(nn.Module):
    """Online and target networks. The target starts as a copy, stays in train mode and gets no gradient.

    The initial weights depend only on (encoder, head, seed). The optimiser computes the EMA that moves the target, or,
    with a lagged target, the loss does. With target_statistics "running" the target's batch norms are in evaluation
    mode, on statistics that update_target_statistics moves. `target` is None for objectives without a target network.
    `views`: of an image that both networks see, V in all; each is a population of batch norm.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        head: HeadConfig,
        *,
        seed: int,
        views: int = VIEWS,
        target_statistics: str = "batch",
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.views, self.target_statistics = views, target_statistics
        backbone = build_encoder(encoder, seed=seed, views=views)
        freeze_(backbone, encoder.frozen)
        projector = MLP(backbone.features, head, depth=head.projector_depth, views=views)
        predictor = MLP(head.out, head, depth=head.predictor_depth, views=views)
        generator = torch.Generator().manual_seed(seed + 1)
        init_(projector, generator)
        init_(predictor, generator)
        self.local_predictor: MLP | None = None
        if head.local_predictor:
            self.local_predictor = MLP(head.out, head, depth=head.predictor_depth, views=views)
            init_(self.local_predictor, generator)
        self.online = Branch(backbone, projector)
        self.predictor = predictor
        self.target = copy.deepcopy(self.online).requires_grad_(False) if objective.has_target else None
        self.target_source = objective.target
        self.objective = build_objective(objective, dimensions=head.out, seed=seed + 2)
        batchnorm.set_views_(self.objective, views)
        self._workspace = Workspace()  # for a lagged target
        self.train()  # a target on running statistics is in evaluation mode

    def forward(self, views: Tensor, local: Tensor | None = None, *, tau: Tensor | None = None) -> Output:
        """Compute the loss of views [V*B, 3, H, W], view-major (paper, section 3.1 and eq. 2).

        local: local views [L*B, 3, h, w], which the online network alone sees, and which move no running statistics.
        With tau, a scalar on the views' device, the kernel launch that computes the loss also moves the target towards
        the parameters of this forward: one step later than in the paper.
        """
        # the target first: it keeps no activations, and the online network has none yet
        targets = self._project_by_target(views)
        representations = self.online.encoder(views)
        projections = self.online.projector(representations)
        predictions = self.predictor(projections)
        if targets is None:
            targets = projections if self.target_source == "online" else projections.detach()
        first_view = representations.detach().chunk(self.views)[0]
        if tau is None:
            of_local = () if local is None else (self._predict_local(local, images=len(first_view)),)
            loss: Tensor = self.objective(predictions, targets, *of_local)
            return Output(loss, targets.detach(), first_view)
        assert self.target is not None  # Recipe rejects a lagged target without a target network
        target_params, online_params = list(self.target.parameters()), list(self.online.parameters())
        loss = ema_loss(predictions, targets, target_params, online_params, tau=tau, workspace=self._workspace)
        return Output(loss, targets, first_view)

    def _predict_local(self, local: Tensor, *, images: int) -> Tensor:
        """Return the predictions [L*B, D] of local views of B images."""
        predictor = self.predictor if self.local_predictor is None else self.local_predictor
        with batchnorm.seeing_local_views(self.online, predictor, views=len(local) // images):
            predictions: Tensor = predictor(self.online(local))
        return predictions

    def _project_by_target(self, views: Tensor) -> Tensor | None:
        """Return the target network's projections of the views [V*B, D], None without a target network."""
        if self.target is None:
            return None
        with torch.no_grad():
            projections: Tensor = self.target(views)
        return projections

    def train(self, mode: bool = True) -> BYOL:
        """Set train or evaluation mode; a target on running statistics stays in evaluation mode."""
        super().train(mode)
        if self.target is not None:
            self.target.train(mode and self.target_statistics == "batch")
        return self

    def set_beta(self, beta: float) -> None:
        """Set the weight of the negatives for the next forward."""
        assert isinstance(self.objective, Objective)  # ObjectiveConfig rejects a beta that moves in other losses
        self.objective.set_beta(beta)

    def synchronize_(self, group: dist.ProcessGroup | None) -> None:
        """Share batch-norm statistics and negatives among the ranks of a group, each with equally many images."""
        batchnorm.synchronize_(self, group)
        self.objective.group = group  # type: ignore[assignment]  # a plain attribute, for losses with negatives

    def update_target_statistics(self, tau: Tensor) -> None:
        """Move the target's running statistics towards the online network's by the EMA, at the weights' tau."""
        assert self.target is not None  # Recipe rejects running statistics without a target network
        targets, sources = (
            [buffer for buffer in branch.buffers() if buffer.is_floating_point()]
            for branch in (self.target, self.online)
        )
        if targets:  # an encoder may have no batch norm
            reference.ema_(targets, sources, tau=tau)

    def target_of(self) -> dict[nn.Parameter, Tensor]:
        """Map each online parameter to the target parameter that follows it; {} where the target does not move."""
        if self.target is None or self.target_source == "constant":
            return {}
        return dict(zip(self.online.parameters(), self.target.parameters(), strict=True))


def freeze_(encoder: Encoder, frozen: str) -> None:
    """Take the gradient from parameters whose names begin with one of the words; raise ConfigError where none does."""
    for word in frozen.split():
        named = [parameter for name, parameter in encoder.named_parameters() if name.startswith(word)]
        require(
            bool(named),
            f"frozen is {word!r}, and no parameter of encoder {encoder.config.arch} begins so; its first is "
            f"{next(iter(encoder.state_dict()), 'none')}",
        )
        for parameter in named:
            parameter.requires_grad_(False)


def embedding_std(projections: Tensor, *, views: int = VIEWS) -> Tensor:
    """Return the std over images of one view's unit-length projections, averaged over D: a measure of collapse.

    projections: [V*B, D], view-major. About 1/sqrt(D) when healthy, 0 when every image maps to one point. No host sync.
    """
    first = reference.normalize_rows(projections.chunk(views)[0].float())
    return first.std(0, correction=0).mean()
