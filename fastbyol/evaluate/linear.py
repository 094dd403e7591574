"""The linear protocol: classifiers of every learning rate, trained at once as one matrix on frozen features."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.evaluate import metrics
from fastbyol.evaluate.features import Features, check_features, labels_of, represent, represent_both
from fastbyol.evaluate.finetune import MOMENTUM
from fastbyol.evaluate.images import InputSettings, random_crops, shuffled_batches
from fastbyol.evaluate.protocol import Files, Job, Protocol, add_lrs, add_seed
from fastbyol.evaluate.splits import hold_out
from fastbyol.model.parts import Encoder
from fastbyol.recipe import scale_lr
from fastbyol.storage.scores import Scores
from fastbyol.system.command_line import whole_number
from fastbyol.system.progress import Progress
from fastbyol.system.threads import NO_TUNING, ThreadTuner

BASE_LRS = (0.4, 0.3, 0.2, 0.1, 0.05)  # paper, appendix C.1; times batch / 256, cosine to 0: the authors' code
BATCH = 1024
EPOCHS = 80
LOG_MIN = -45.0  # least log-probability: far below rounding; products with denormals are many times slower
TrainBatch = tuple[Tensor, Tensor, Tensor]  # representations [n, F], labels [n], is held out [n] bool


class Score(NamedTuple):
    """Accuracies in percent with 95 % bootstrap intervals, and the base learning rate that gave them."""

    top1: float
    top5: float
    base_lr: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]
    held_out: dict[float, float]  # top-1 of each base learning rate on the held-out images


class Heads:
    """H linear classifiers in one matrix, trained by SGD with Nesterov momentum 0.9 and no weight decay.

    rates: [H], peak learning rates; sees_all: [H] bool, whether a head also learns from held-out images. Weights are
    [F, H*C], so that one product serves all heads; weights and biases start at 0.
    """

    def __init__(self, features: int, classes: int, *, rates: Tensor, sees_all: Tensor) -> None:
        self.rates, self.sees_all, self.classes = rates, sees_all, classes
        device = rates.device
        self.weights = torch.zeros(features, len(rates) * classes, device=device)
        self.biases = torch.zeros(len(rates) * classes, device=device)
        self._momenta = torch.zeros_like(self.weights), torch.zeros_like(self.biases)

    def scores(self, values: Tensor) -> Tensor:
        """Map representations [n, F] to logits [n, H, C]."""
        return torch.addmm(self.biases, values, self.weights).view(len(values), len(self.rates), self.classes)

    def scores_of(self, head: int, values: Tensor) -> Tensor:
        """Map representations [n, F] to the logits of one head, [n, C]."""
        own = slice(head * self.classes, (head + 1) * self.classes)
        return torch.addmm(self.biases[own], values, self.weights[:, own])

    def sgd_step(self, values: Tensor, labels: Tensor, held: Tensor, *, scale: float) -> None:
        """Take one SGD step at `scale` times the peak rates; a head's loss is the mean cross-entropy of its rows."""
        counted = (self.sees_all | ~held[:, None]).float()  # [n, H]
        counted /= counted.sum(0).clamp_min(1)
        error = self.scores(values).log_softmax(-1).clamp_min_(LOG_MIN).exp_()
        error.scatter_add_(2, labels[:, None, None].expand(-1, len(self.rates), 1), -torch.ones_like(error[..., :1]))
        error = error.mul_(counted[..., None]).flatten(1)
        steps = (self.rates * scale).repeat_interleave(self.classes)
        for p, u, gradient in zip(
            (self.weights, self.biases), self._momenta, (values.T @ error, error.sum(0)), strict=True
        ):
            u.mul_(MOMENTUM).add_(gradient)
            p.sub_(gradient.add_(u, alpha=MOMENTUM).mul_(steps))


@torch.inference_mode()
def fit(
    train_batches: Iterable[TrainBatch],
    steps: int,
    base_lrs: Sequence[float],
    *,
    batch: int,
    classes: int,
    label: str,
    threads: ThreadTuner,
) -> Heads:
    """Train the heads on `steps` batches with a cosine learning rate that ends at 0.

    Heads 0..L-1, one per learning rate, learn from all images. With several rates, heads L..2L-1 learn from all but the
    held-out images, so that one pass chooses the rate and also fits the classifier on the whole training file.
    """
    rates = [scale_lr(lr, batch_size=batch) for lr in base_lrs] * (2 if len(base_lrs) > 1 else 1)
    heads: Heads | None = None
    bar = Progress(train_batches, total=steps, desc=label, unit="steps")
    for step, (values, labels, held) in enumerate(threads.units(bar, label)):
        if heads is None:
            places = torch.arange(len(rates), device=values.device)
            heads = Heads(
                values.shape[1],
                classes,
                rates=torch.tensor(rates, device=values.device),
                sees_all=places < len(base_lrs),
            )
        heads.sgd_step(values, labels, held, scale=(1 + math.cos(math.pi * step / steps)) / 2)
    assert heads is not None, "a pass has at least one step"
    return heads


@torch.inference_mode()
def score_best_rate(heads: Heads, base_lrs: Sequence[float], held: Features, val: Features, *, seed: int) -> Score:
    """Choose a learning rate by top-1 on the held-out images; score the head that learned from all images on `val`."""
    count, device = len(base_lrs), heads.weights.device
    tried: dict[float, float] = {}
    if count > 1:
        seen = held.values.to(device)
        for n, lr in enumerate(base_lrs):
            tried[lr] = metrics.top1(heads.scores_of(count + n, seen).cpu(), held.labels)
    base_lr = max(tried, key=tried.__getitem__) if tried else base_lrs[0]
    chosen = heads.scores_of(list(base_lrs).index(base_lr), val.values.to(device)).cpu()
    return Score(**metrics.accuracies(chosen, val.labels, seed=seed), base_lr=base_lr, held_out=tried)


def _batch_and_steps(count: int, epochs: int) -> tuple[int, int]:
    """Return the batch size and the number of steps."""
    batch = min(BATCH, count)
    return batch, max(epochs * count // batch, 1)


def score(
    train: Features,
    val: Features,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    base_lrs: Sequence[float] = BASE_LRS,
    device: str = "cpu",
    threads: ThreadTuner = NO_TUNING,
    label: str = "linear",
) -> Score:
    """Fit linear classifiers on cached representations `train` and score the one with the best learning rate on `val`.

    SGD with Nesterov momentum 0.9, cosine to 0, no weight decay, batch 1024; the learning rate is chosen on a held-out
    tenth of `train`. Source: paper, appendix C.1; here each image has one view (docs/numerics.md).
    """
    classes = int(torch.cat([train.labels, val.labels]).max()) + 1
    batch, steps = _batch_and_steps(len(train.labels), epochs)
    split = hold_out(len(train.labels), seed=seed)
    is_held = torch.zeros(len(train.labels), dtype=torch.bool)
    is_held[torch.from_numpy(split.held)] = True

    def train_batches() -> Iterator[TrainBatch]:
        for rows in shuffled_batches(np.arange(len(train.labels)), batch=batch, steps=steps, seed=seed):
            chosen = torch.from_numpy(rows.indices)
            yield train.values[chosen].to(device), train.labels[chosen].to(device), is_held[chosen].to(device)

    heads = fit(train_batches(), steps, base_lrs, batch=batch, classes=classes, label=label, threads=threads)
    return score_best_rate(heads, base_lrs, train.rows(split.held), val, seed=seed)


def score_augmented(
    encoder: Encoder,
    files: tuple[Reader, Reader],
    inputs: InputSettings,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    base_lrs: Sequence[float] = BASE_LRS,
    label: str = "linear",
) -> Score:
    """Score like `score`, but train on a new random crop and flip of every image in every epoch: the paper's protocol.

    Held-out images and the images of the second file are scored on their centre views. The encoder is left in
    evaluation mode.
    """
    train, val = files
    split = hold_out(len(train), seed=seed)
    held_out, scored = (
        represent(encoder, reader, rows, inputs) for reader, rows in ((train, split.held), (val, np.arange(len(val))))
    )
    check_features(scored, val.path)
    truth, is_held = labels_of(train), np.zeros(len(train), dtype=np.bool_)
    is_held[split.held] = True
    batch, steps = _batch_and_steps(len(train), epochs)
    encoder.eval()

    def train_batches() -> Iterator[TrainBatch]:
        rows = shuffled_batches(np.arange(len(train)), batch=batch, steps=steps, seed=seed)
        for images, indices in random_crops(train, rows, inputs, seed=seed):
            with inputs.precision():
                values = encoder(images).float()
            wanted, held = (torch.from_numpy(x[indices]).to(inputs.device) for x in (truth, is_held))
            yield values, wanted, held

    classes = int(max(truth.max(), labels_of(val).max())) + 1
    heads = fit(train_batches(), steps, base_lrs, batch=batch, classes=classes, label=label, threads=inputs.threads)
    return score_best_rate(heads, base_lrs, held_out, scored, seed=seed)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cached",
        action="store_true",
        help="represent each image once, by its centre: fast; the paper draws a crop and flip each epoch",
    )
    parser.add_argument("--epochs", type=whole_number, default=EPOCHS, metavar="N", help="length of the training")
    add_lrs(parser, BASE_LRS, text="learning rates per 256 images, all trained at once")
    add_seed(parser)
    parser.add_argument("--skip-random-init", action="store_true", help="score the trained encoder alone")


def _prepare(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, Job]:
    settings = {"epochs": args.epochs, "seed": args.seed, "base_lrs": args.lrs}

    def job(encoder: Encoder, label: str) -> Scores:
        if not args.cached:
            return score_augmented(encoder, files, inputs, **settings, label=label)._asdict()
        train, val = represent_both(encoder, files, inputs)
        result = score(train, val, **settings, device=inputs.device, threads=inputs.threads, label=label)
        return result._asdict()

    views = "cached" if args.cached else "crop and flip"
    return {"views": views, "epochs": args.epochs, "seed": args.seed}, job


PROTOCOL = Protocol(_add_arguments, _prepare, scores_baseline=lambda args: not args.skip_random_init)
