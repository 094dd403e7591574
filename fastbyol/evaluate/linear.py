"""Know the linear protocol over frozen, cached representations: a learning-rate sweep as one batch of classifiers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from fastbyol.evaluate.features import Features

BASE_LRS = (0.4, 0.3, 0.2, 0.1, 0.05)  # times batch / 256; paper, appendix C.1
BATCH = 1024
EPOCHS = 80
MOMENTUM = 0.9
HELD_OUT = 0.1  # of train, to choose the learning rate


class Score(NamedTuple):
    """Give accuracies in percent and the base learning rate they were reached with."""

    top1: float
    top5: float
    base_lr: float


def _fit(
    train: Features, base_lrs: tuple[float, ...], *, classes: int, epochs: int, seed: int, label: str
) -> tuple[Tensor, Tensor]:
    """Train one classifier a learning rate: weights [L, F, classes] and biases [L, 1, classes]."""
    values, labels = train
    batch = min(BATCH, len(labels))
    rates = torch.tensor(base_lrs).view(-1, 1, 1) * batch / 256
    params = [torch.zeros(len(base_lrs), values.shape[1], classes), torch.zeros(len(base_lrs), 1, classes)]
    momenta = [torch.zeros_like(p) for p in params]
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(labels) // batch
    total = epochs * steps_per_epoch
    step = 0
    for _ in trange(epochs, desc=label, unit="epoch", delay=2, leave=False, disable=None):
        for rows in torch.randperm(len(labels), generator=generator)[: steps_per_epoch * batch].chunk(steps_per_epoch):
            x, y = values[rows], F.one_hot(labels[rows], classes).float()
            error = ((x @ params[0] + params[1]).softmax(-1) - y) / batch
            cosine = (1 + math.cos(math.pi * step / total)) / 2
            for p, u, gradient in zip(params, momenta, (x.T @ error, error.sum(1, keepdim=True)), strict=True):
                u.mul_(MOMENTUM).add_(gradient)
                p.sub_(rates * cosine * (gradient + MOMENTUM * u))
            step += 1
    return params[0], params[1]


def _accuracies(features: Features, weights: Tensor, biases: Tensor, *, k: int) -> list[float]:
    """Score each of L classifiers: percent of images whose label is among its k best classes."""
    scores = []
    for w, b in zip(weights, biases, strict=True):
        best = (features.values @ w + b).topk(min(k, w.shape[1])).indices
        scores.append(100 * (best == features.labels[:, None]).any(1).double().mean().item())
    return scores


@torch.inference_mode()
def score(train: Features, val: Features, *, epochs: int = EPOCHS, seed: int = 0, label: str = "linear") -> Score:
    """Fit a linear classifier on `train` and score it on `val`.

    SGD with Nesterov momentum .9, cosine to 0, no weight decay, batch 1024. The learning rate is chosen on a tenth of
    train held out, and the classifier refitted on all of train. Source: paper, appendix C.1; features are cached from
    one centre view, where the paper draws a new crop and flip each epoch (docs/numerics.md).
    """
    classes = int(torch.cat([train.labels, val.labels]).max()) + 1
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    held, kept = order.tensor_split([max(int(len(order) * HELD_OUT), 1)])
    fitted = _fit(
        Features(train.values[kept], train.labels[kept]),
        BASE_LRS,
        classes=classes,
        epochs=epochs,
        seed=seed,
        label=f"{label} sweep",
    )
    chosen = _accuracies(Features(train.values[held], train.labels[held]), *fitted, k=1)
    base_lr = BASE_LRS[max(range(len(chosen)), key=chosen.__getitem__)]
    final = _fit(train, (base_lr,), classes=classes, epochs=epochs, seed=seed, label=f"{label} final")
    return Score(_accuracies(val, *final, k=1)[0], _accuracies(val, *final, k=5)[0], base_lr)
