"""Know the online probe: a linear classifier trained beside BYOL, on representations that it cannot change."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol import optim
from fastbyol.config import OptimConfig
from fastbyol.encoder import init_


class Reading(NamedTuple):
    """Give the mean cross-entropy and the percent of images classified right, over the steps since the last reading."""

    loss: float
    top1: float


class Probe:
    """Classify the first view's representations [B, F] as the step leaves them, by LARS at BYOL's own rates.

    An image is classified before the step learns from it. Over the ranks of `group` gradients are averaged, so that
    all ranks hold one classifier; its reading is of this rank's images. Source: the authors' code.
    """

    def __init__(
        self, features: int, classes: int, config: OptimConfig, *, seed: int, device: torch.device | str
    ) -> None:
        self.group: dist.ProcessGroup | None = None
        self.classifier = nn.Linear(features, classes)
        init_(self.classifier, torch.Generator().manual_seed(seed))
        self.classifier.to(device)
        self.optimizer = optim.build(self.classifier, {}, config)
        self.sums = torch.zeros(3, device=device)  # images, their cross-entropy, how many are right

    def step(self, representations: Tensor, labels: Tensor, *, lr: float) -> None:
        """Learn from representations [B, F] with labels int64 [B], on the probe's device. No host sync."""
        self.optimizer.set_rates(lr=lr, tau=1.0)
        self.optimizer.zero_grad()
        logits = self.classifier(representations.detach().to(self.classifier.weight.dtype))
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.group is not None:
            for parameter in self.classifier.parameters():
                dist.all_reduce(parameter.grad, group=self.group)
                assert parameter.grad is not None
                parameter.grad /= dist.get_world_size(self.group)
        self.optimizer.step()
        right = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([torch.ones_like(loss), loss, right / len(labels)]).detach() * len(labels)

    def take(self) -> Tensor:
        """Give the sums for `reading` [3], float32 on the probe's device, and begin anew. No host sync."""
        taken = self.sums.clone()
        self.sums.zero_()
        return taken

    @staticmethod
    def reading(images: float, loss: float, right: float) -> Reading:
        """Turn the sums that `take` gave into a reading; NaN after no step."""
        return Reading(loss / images, 100 * right / images) if images else Reading(torch.nan, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Gather what a resumed run needs."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict gathered."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.copy_(state["sums"])
