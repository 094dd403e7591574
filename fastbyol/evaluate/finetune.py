"""Know how a whole network is tuned on labels: one loop for semi-supervised, transfer and dense fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fastbyol.beton import Reader
from fastbyol.config import require
from fastbyol.encoder import ResNet
from fastbyol.evaluate import metrics
from fastbyol.evaluate.features import labels_of
from fastbyol.evaluate.images import BATCH as BATCH_CENTRED
from fastbyol.evaluate.images import Lens, centred, cropped, shuffled
from fastbyol.evaluate.splits import Split, hold_out

MOMENTUM = 0.9
BATCH = 256
STEPS = 20_000
LRS = tuple(10 ** (-4 + n / 2) for n in range(7))  # 1e-4 to 1e-1; paper, appendix D: SimCLR's grid
WEIGHT_DECAYS = (*(10 ** (-6 + n / 2) for n in range(7)), 0.0)  # 1e-6 to 1e-3 and none, each divided by the rate
BN_STEPS = 10.0  # batch norm's running statistics keep max(1 - 10 / s, .9), s steps an epoch


class Plan(NamedTuple):
    """Say how one network is tuned: peak rate, weight decay as SGD takes it, number of steps, images of a batch."""

    lr: float
    weight_decay: float
    steps: int
    batch: int


class Grid(NamedTuple):
    """Say what is tried: peak rates, weight decays before they are divided by the rate, and steps."""

    lrs: Sequence[float] = LRS
    weight_decays: Sequence[float] = WEIGHT_DECAYS
    steps: int = STEPS

    def plans(self, *, batch: int) -> list[Plan]:
        """List every plan; the product of rate and weight decay is what was named."""
        return [Plan(lr, decay / lr, self.steps, batch) for lr, decay in product(self.lrs, self.weight_decays)]


class Trial(NamedTuple):
    """Pair a plan with its score on held-out images, in percent."""

    plan: Plan
    score: float


class Classifier(nn.Module):
    """An encoder with a linear layer, which starts at 0: images [N, 3, H, W] to logits [N, classes]."""

    def __init__(self, encoder: ResNet, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.features, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.linear(self.encoder(images))
        return logits


def copy_of(encoder: ResNet) -> ResNet:
    """Copy an encoder so that it can be tuned: a batch is one population to its batch norms."""
    tuned = ResNet(encoder.config, views=1)
    tuned.load_state_dict(encoder.state_dict())
    return tuned.to(encoder.conv1.weight.device)


def descend(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    plan: Plan,
    lens: Lens,
    label: str,
) -> None:
    """Tune every parameter by SGD with Nesterov momentum .9, the rate falling as a cosine to 0; leave evaluation mode.

    `batches` yields plan.steps pairs of images and what `loss` compares the output with. Changes the network in place.
    """
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=plan.lr, momentum=MOMENTUM, nesterov=True, weight_decay=plan.weight_decay
    )
    bar = tqdm(batches, total=plan.steps, desc=label, unit="steps", delay=2, leave=False, disable=None)
    for step, (images, wanted) in enumerate(lens.threads.units(bar, ("tune", plan.batch))):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * (1 + math.cos(math.pi * step / plan.steps)) / 2
        with lens.precision():
            output = network(images)
        optimizer.zero_grad()
        loss(output.float(), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()


def tune(
    encoder: ResNet,
    reader: Reader,
    indices: NDArray[np.int64],
    *,
    plan: Plan,
    lens: Lens,
    seed: int,
    label: str,
) -> Classifier:
    """Tune a copy of the encoder and a new linear layer on the images named, cropped and flipped anew each time.

    Running statistics of batch norm keep max(1 - 10 / s, .9) of themselves a step, s the steps of an epoch.
    """
    require(plan.batch >= 2, f"{len(indices)} labelled images to tune on; batch norm needs at least 2")
    labels = torch.from_numpy(labels_of(reader))
    network = Classifier(copy_of(encoder), int(labels.max()) + 1).to(lens.device)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = min(BN_STEPS * plan.batch / len(indices), 0.1)
    rows = shuffled(indices, batch=plan.batch, steps=plan.steps, seed=seed)
    batches = (
        (images, labels[torch.from_numpy(chosen)].to(lens.device))
        for images, chosen in cropped(reader, rows, lens, seed=seed)
    )
    descend(network, batches, F.cross_entropy, plan=plan, lens=lens, label=label)
    return network


@torch.inference_mode()
def guess(network: Classifier, reader: Reader, indices: NDArray[np.int64], lens: Lens) -> tuple[Tensor, Tensor]:
    """Return logits [N, classes] and labels [N] of the centre views of the images named, on the CPU."""
    parts = []
    bar = tqdm(
        centred(reader, indices, lens),
        total=math.ceil(len(indices) / BATCH_CENTRED),
        desc=reader.path.name,
        unit="batches",
        delay=2,
        leave=False,
        disable=None,
    )
    for images, here in lens.threads.units(bar, "guess"):
        with lens.precision():
            parts.append(network(images)[: len(here)].float().cpu())
    return torch.cat(parts), torch.from_numpy(labels_of(reader)[indices])


def score(
    encoder: ResNet,
    files: tuple[Reader, Reader],
    *,
    grid: Grid,
    metric: str = "top1",
    lens: Lens,
    seed: int = 0,
    label: str = "finetune",
) -> dict[str, Any]:
    """Fine-tune on the first file by every plan, choose on a tenth held out, refit on all; score the second.

    Batch 256, or all images where there are fewer. With one plan there is nothing to choose. Source: paper, appendix D;
    byol-spec, Evaluation.
    """
    train, val = files
    split = hold_out(len(train), seed=seed)
    plans = grid.plans(batch=min(BATCH, len(split.learn)))
    tried: list[Trial] = []
    if len(plans) > 1:
        run = trials(encoder, train, split, plans, metric=metric, lens=lens, seed=seed, label=label)
        tried = [trial for trial, _ in run]
    best = max(tried, key=lambda trial: trial.score).plan if tried else plans[0]
    every = np.arange(len(train))
    final = tune(encoder, train, every, plan=best, lens=lens, seed=seed, label=f"{label} final")
    scores, labels = guess(final, val, np.arange(len(val)), lens)
    return {
        **metrics.accuracies(scores, labels, seed=seed),
        "metric": metric,
        "score": metrics.METRICS[metric](scores, labels),
        **best._asdict(),
        "held_out": [{**trial.plan._asdict(), "score": trial.score} for trial in tried],
    }


def trials(
    encoder: ResNet,
    train: Reader,
    split: Split,
    plans: Sequence[Plan],
    *,
    metric: str,
    lens: Lens,
    seed: int,
    label: str,
) -> Iterator[tuple[Trial, Classifier]]:
    """Tune by every plan on split.learn, score on split.held, and yield the score with the tuned network."""
    for n, plan in enumerate(plans):
        told = f"{label} {n + 1}/{len(plans)}"
        network = tune(encoder, train, split.learn, plan=plan, lens=lens, seed=seed, label=told)
        yield Trial(plan, metrics.METRICS[metric](*guess(network, train, split.held, lens))), network
