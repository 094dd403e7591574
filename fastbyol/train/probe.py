"""Online linear probe: a classifier trained alongside BYOL on detached representations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.beton import UNLABELLED, Reader
from fastbyol.config import Config, OptimConfig
from fastbyol.evaluate.features import CLASSES_MAX
from fastbyol.model.parts import build_optimizer
from fastbyol.model.resnet import init_
from fastbyol.optim.muon import VECTOR_RATE
from fastbyol.system.distributed import World

RECENT = 0.95  # the progress from which on the mean of a run's rows is the probe's score


class ProbeMetrics(NamedTuple):
    """Mean cross-entropy and top-1 accuracy in percent, over the steps since the sums were last taken."""

    loss: float
    top1: float


class Probe:
    """A linear classifier of the first view's representations [B, F], trained at BYOL's learning rates.

    By AdamW where BYOL is, else by LARS; beside Muon at the rate of its biases.

    Each image is classified before the classifier learns from it. Gradients are averaged over the ranks of `group`, so
    that all ranks hold the same classifier; the metrics are of this rank's images. Source: the authors' code.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        config: OptimConfig,
        *,
        seed: int,
        device: torch.device | str,
        optimizer: str = "lars",
    ) -> None:
        self.group: dist.ProcessGroup | None = None
        self.classifier = nn.Linear(features, classes)
        init_(self.classifier, torch.Generator().manual_seed(seed))
        self.classifier.to(device)
        name = optimizer if optimizer == "adamw" else "lars"
        self.optimizer = build_optimizer(name, self.classifier, {}, config)
        self.share = VECTOR_RATE if optimizer == "muon" else 1.0  # of the learning rate
        self.sums = torch.zeros(3, device=device)  # images, summed cross-entropy, correct images

    def step(self, representations: Tensor, labels: Tensor, *, lr: float) -> None:
        """Train on representations [B, F] with labels [B] int64, or UNLABELLED, on the probe's device. No host sync."""
        self.optimizer.set_rates(lr=self.share * lr, tau=1.0)
        self.optimizer.zero_grad()
        logits = self.classifier(representations.detach().to(self.classifier.weight.dtype))
        count = (labels != UNLABELLED).sum()
        total = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
        known = count.to(total)  # labelled images of a rank, on average
        if self.group is not None:
            dist.all_reduce(known, group=self.group)
            known /= dist.get_world_size(self.group)
        (total / torch.where(known > 0, known, 1.0)).backward()  # type: ignore[no-untyped-call]
        if self.group is not None:
            for parameter in self.classifier.parameters():
                dist.all_reduce(parameter.grad, group=self.group)
                assert parameter.grad is not None
                parameter.grad /= dist.get_world_size(self.group)
        self.optimizer.step()
        correct = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([count.to(total), total.detach(), correct.to(total)])

    def take_sums(self) -> Tensor:
        """Return the sums for metrics(), [3] float32 on the probe's device, and reset them. No host sync."""
        taken = self.sums.clone()
        self.sums.zero_()
        return taken

    @staticmethod
    def metrics(images: float, loss: float, correct: float) -> ProbeMetrics:
        """Compute the metrics from the sums of take_sums(); NaN without a step."""
        return ProbeMetrics(loss / images, 100 * correct / images) if images else ProbeMetrics(torch.nan, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that state_dict returned."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.copy_(state["sums"])


def recent_top1(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the probe's mean top-1 accuracy in percent over a run's last rows; None where none had labels.

    The last row alone may stand for a single step.
    """
    recent = [row for row in rows if row["progress"] >= RECENT]
    found = [row.get("probe_top1", math.nan) for row in recent]
    known = [top1 for top1 in found if math.isfinite(top1)]
    return fmean(known) if known else None


def build_probe(config: Config, reader: Reader, world: World, *, features: int) -> Probe | None:
    """Build the online probe for a file with labels; None without any, or with one outside the classes."""
    if reader.labels is None or reader.labels.min() < UNLABELLED or not 0 <= reader.labels.max() < CLASSES_MAX:
        return None
    classes = int(reader.labels.max()) + 1
    probe = Probe(
        features,
        classes,
        config.recipe.optim,
        seed=config.seed + 3,
        device=config.device,
        optimizer=config.recipe.optim.optimizer,
    )
    probe.group = world.group
    return probe
