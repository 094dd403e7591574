"""Know the semi-supervised protocol: fine-tuning on 1 or 10 % of the labels, beside the same network from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from fastbyol.beton import Reader
from fastbyol.encoder import ResNet
from fastbyol.evaluate import metrics
from fastbyol.evaluate.finetune import Classifier, Plan, Trial, guess, trials
from fastbyol.evaluate.images import Lens
from fastbyol.evaluate.splits import Split

BATCH = 1024
BASE_LRS = (0.005, 0.01, 0.02, 0.05, 0.1)  # times batch / 256; paper, appendix C.1
EPOCHS = (30, 50)


def plans(images: int, base_lrs: Sequence[float], epochs: Sequence[int]) -> list[Plan]:
    """List the sweep for so many labelled images: batch 1024, or all where there are fewer; no weight decay."""
    batch = min(BATCH, images)
    return [Plan(lr * batch / 256, 0.0, max(n * images // batch, 1), batch) for lr, n in product(base_lrs, epochs)]


def score(
    encoder: ResNet,
    files: tuple[Reader, Reader],
    split: Split,
    *,
    base_lrs: Sequence[float] = BASE_LRS,
    epochs: Sequence[int] = EPOCHS,
    lens: Lens,
    seed: int = 0,
    label: str = "semi",
) -> dict[str, Any]:
    """Fine-tune on split.learn of the first file, choose by top-1 on split.held, score the network on the second.

    Every parameter is tuned, by SGD with Nesterov momentum .9 and a cosine, without regularisation. The held-out images
    lie outside the labelled part, as in the paper; they choose the rate and length, nothing is learnt from them.
    """
    train, val = files
    sweep = plans(len(split.learn), base_lrs, epochs)
    tried: list[Trial] = []
    network: Classifier | None = None
    for trial, tuned in trials(encoder, train, split, sweep, metric="top1", lens=lens, seed=seed, label=label):
        if network is None or trial.score > max(other.score for other in tried):
            network = tuned
        tried.append(trial)
    assert network is not None, "a sweep has at least one plan"
    named = [{"base_lr": lr, "epochs": n} for lr, n in product(base_lrs, epochs)]
    held_out = [{**name, "top1": trial.score} for name, trial in zip(named, tried, strict=True)]
    best = max(range(len(tried)), key=lambda n: tried[n].score)
    scores, labels = guess(network, val, np.arange(len(val)), lens)
    return {
        **metrics.accuracies(scores, labels, seed=seed),
        **named[best],
        "labelled": len(split.learn),
        "held_out": held_out,
    }
