"""Fine-tuning of a whole network on labels; one loop serves semi-supervised, transfer and segmentation protocols."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.beton import Reader
from fastbyol.errors import require
from fastbyol.evaluate import metrics
from fastbyol.evaluate.features import labels_of
from fastbyol.evaluate.images import InputSettings, center_views, random_crops, shuffled_batches
from fastbyol.evaluate.protocol import Files, Job, Protocol, add_from_scratch, add_lrs, add_seed
from fastbyol.evaluate.splits import Split, hold_out
from fastbyol.model.parts import Encoder
from fastbyol.storage.scores import Scores
from fastbyol.system.command_line import nonnegative_number, whole_number
from fastbyol.system.progress import Progress

MOMENTUM = 0.9
BATCH = 256
STEPS = 20_000
LRS = tuple(10 ** (-4 + n / 2) for n in range(7))  # 1e-4 to 1e-1; paper, appendix D: SimCLR's grid
WEIGHT_DECAYS = (*(10 ** (-6 + n / 2) for n in range(7)), 0.0)  # 1e-6 to 1e-3 and 0, each divided by the learning rate
BN_STEPS = 10.0  # batch norm's running statistics keep max(1 - 10 / s, 0.9) per step, with s steps per epoch


class HParams(NamedTuple):
    """Hyperparameters of one fine-tuning: peak learning rate, SGD's weight decay, number of steps, batch size."""

    lr: float
    weight_decay: float
    steps: int
    batch: int


class Grid(NamedTuple):
    """A grid of peak learning rates and weight decays (before division by the learning rate), and a number of steps."""

    lrs: Sequence[float] = LRS
    weight_decays: Sequence[float] = WEIGHT_DECAYS
    steps: int = STEPS

    def combinations(self, *, batch: int) -> list[HParams]:
        """List every combination; learning rate times weight decay equals the grid's weight decay."""
        return [HParams(lr, decay / lr, self.steps, batch) for lr, decay in product(self.lrs, self.weight_decays)]


class Trial(NamedTuple):
    """Hyperparameters and their score on held-out images, in percent."""

    hparams: HParams
    score: float


class Classifier(nn.Module):
    """An encoder and a linear layer that starts at 0: maps images [N, 3, H, W] to logits [N, classes]."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.features, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.linear(self.encoder(images))
        return logits


def run_sgd(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    hparams: HParams,
    inputs: InputSettings,
    label: str,
) -> None:
    """Train every parameter in place by SGD with Nesterov momentum 0.9 and a cosine learning rate that ends at 0.

    `batches` yields hparams.steps pairs (images, targets of `loss`). The network is left in evaluation mode.
    """
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=hparams.lr, momentum=MOMENTUM, nesterov=True, weight_decay=hparams.weight_decay
    )
    bar = Progress(batches, total=hparams.steps, desc=label, unit="steps")
    for step, (images, wanted) in enumerate(inputs.threads.units(bar, ("tune", hparams.batch))):
        for group in optimizer.param_groups:
            group["lr"] = hparams.lr * (1 + math.cos(math.pi * step / hparams.steps)) / 2
        with inputs.precision():
            output = network(images)
        optimizer.zero_grad()
        loss(output.float(), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()


def tune(
    encoder: Encoder,
    reader: Reader,
    indices: NDArray[np.int64],
    *,
    hparams: HParams,
    inputs: InputSettings,
    seed: int,
    label: str,
) -> Classifier:
    """Fine-tune a copy of the encoder and a new linear layer on random crops and flips of the images at `indices`.

    At each step batch norm's running statistics keep max(1 - 10 / s, 0.9) of their value, with s steps per epoch.
    """
    require(
        hparams.batch >= 2, f"{len(indices)} labelled images to fine-tune on; batch norm needs at least 2; give more"
    )
    labels = torch.from_numpy(labels_of(reader))
    network = Classifier(encoder.with_views(1), int(labels.max()) + 1).to(inputs.device)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = min(BN_STEPS * hparams.batch / len(indices), 0.1)
    rows = shuffled_batches(indices, batch=hparams.batch, steps=hparams.steps, seed=seed)
    batches = (
        (images, labels[torch.from_numpy(chosen)].to(inputs.device))
        for images, chosen in random_crops(reader, rows, inputs, seed=seed)
    )
    run_sgd(network, batches, F.cross_entropy, hparams=hparams, inputs=inputs, label=label)
    return network


@torch.inference_mode()
def predict(
    network: Classifier, reader: Reader, indices: NDArray[np.int64], inputs: InputSettings
) -> tuple[Tensor, Tensor]:
    """Return logits [N, classes] and labels [N], on the CPU, of the centre views of the images at `indices`."""
    parts, shown = [], [np.empty(0, np.int64)]
    bar = Progress(
        center_views(reader, indices, inputs),
        total=math.ceil(len(indices) / inputs.batch),
        desc=reader.path.name,
        unit="batches",
    )
    for images, here in inputs.threads.units(bar, "predict"):
        with inputs.precision():
            parts.append(network(images)[: len(here)].float().cpu())
        shown.append(here)
    return torch.cat(parts), torch.from_numpy(labels_of(reader)[np.concatenate(shown)])


def score(
    encoder: Encoder,
    files: tuple[Reader, Reader],
    *,
    grid: Grid,
    metric: str = "top1",
    inputs: InputSettings,
    seed: int = 0,
    label: str = "finetune",
) -> dict[str, Any]:
    """Fine-tune on the first file with the best hyperparameters of the grid and score the second file, in percent.

    Hyperparameters are chosen on a held-out tenth of the first file; the network is then fine-tuned again on all of it.
    A grid of one combination skips the choice. Batch size 256, or all images if there are fewer. Source: paper,
    appendix D, and docs/numerics.md.
    """
    train, val = files
    split = hold_out(len(train), seed=seed)
    combinations = grid.combinations(batch=min(BATCH, len(split.learn)))
    tried: list[Trial] = []
    if len(combinations) > 1:
        run = run_trials(encoder, train, split, combinations, metric=metric, inputs=inputs, seed=seed, label=label)
        tried = [trial for trial, _ in run]
    best = max(tried, key=lambda trial: trial.score).hparams if tried else combinations[0]
    every = np.arange(len(train))
    final = tune(encoder, train, every, hparams=best, inputs=inputs, seed=seed, label=f"{label} final")
    scores, labels = predict(final, val, np.arange(len(val)), inputs)
    return {
        **metrics.accuracies(scores, labels, seed=seed),
        "metric": metric,
        "score": metrics.METRICS[metric](scores, labels),
        **best._asdict(),
        "held_out": [{**trial.hparams._asdict(), "score": trial.score} for trial in tried],
    }


def run_trials(
    encoder: Encoder,
    train: Reader,
    split: Split,
    combinations: Sequence[HParams],
    *,
    metric: str,
    inputs: InputSettings,
    seed: int,
    label: str,
) -> Iterator[tuple[Trial, Classifier]]:
    """Fine-tune on split.learn with every combination, score on split.held, and yield each trial with its network."""
    for n, hparams in enumerate(combinations):
        trial_label = f"{label} {n + 1}/{len(combinations)}"
        network = tune(encoder, train, split.learn, hparams=hparams, inputs=inputs, seed=seed, label=trial_label)
        yield Trial(hparams, metrics.METRICS[metric](*predict(network, train, split.held, inputs))), network


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    metrics.add_metric(parser)
    parser.add_argument("--steps", type=whole_number, default=STEPS, metavar="N", help="steps of each fine-tuning")
    add_lrs(parser, LRS, text="peak learning rates to choose from")
    parser.add_argument(
        "--weight-decays",
        type=nonnegative_number,
        nargs="+",
        default=list(WEIGHT_DECAYS),
        metavar="X",
        help="weight decays to choose from, each divided by the learning rate",
    )
    add_seed(parser)
    add_from_scratch(parser)


def _prepare(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, Job]:
    grid = Grid(args.lrs, args.weight_decays, args.steps)

    def job(encoder: Encoder, label: str) -> Scores:
        return score(encoder, files, grid=grid, metric=args.metric, inputs=inputs, seed=args.seed, label=label)

    return {}, job


PROTOCOL = Protocol(_add_arguments, _prepare, scores_baseline=lambda args: args.from_scratch)
