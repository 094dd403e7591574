"""Scores in percent: top-k and per-class accuracy, 11-point average precision, and a bootstrap interval."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
RECALLS = 11  # recalls 0, 0.1, ..., 1 of PASCAL VOC 2007's average precision


def hits(scores: Tensor, labels: Tensor, *, k: int = 1) -> Tensor:
    """Return for each image whether its label is among its k best classes: bool [N].

    scores: [N, C]; labels: [N]; k above C counts as C. A row with NaN or inf is never a hit, so that a diverged
    classifier is never chosen.
    """
    best = scores.topk(min(k, scores.shape[1])).indices
    return (best == labels[:, None]).any(1) & scores.isfinite().all(1)


def percent(hit: Tensor) -> float:
    """Return the percentage of True, in [0, 100]."""
    return 100 * hit.double().mean().item()


def interval(hit: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of percent(hit).

    This is the percentile bootstrap without its loop: the number of hits among N images resampled with replacement
    follows a binomial distribution, which is sampled directly.
    """
    drawn = np.random.default_rng(seed).binomial(len(hit), hit.double().mean().item(), RESAMPLES)
    low, high = np.quantile(100 * drawn / len(hit), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def top1(scores: Tensor, labels: Tensor) -> float:
    """Return the percentage of images whose best class is right."""
    return percent(hits(scores, labels))


def mean_per_class(scores: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy averaged over the classes that occur in labels."""
    hit = hits(scores, labels).double()
    counts = torch.bincount(labels, minlength=scores.shape[1]).double()
    right = torch.zeros_like(counts).scatter_add_(0, labels, hit)
    return 100 * (right / counts)[counts > 0].mean().item()


def map11(scores: Tensor, labels: Tensor) -> float:
    """Return the 11-point average precision, averaged over the classes that occur in labels, each against the rest.

    Images are ranked by a class's softmax probability. Source: Everingham et al. 2010, section 4.2: the mean over
    recall r = 0, 0.1, ..., 1 of the largest precision at any recall of at least r.
    """
    ranked = scores.double().softmax(1).nan_to_num(0.0).argsort(dim=0, descending=True, stable=True)
    precisions = []
    for c in torch.bincount(labels).nonzero().flatten().tolist():
        found = (labels[ranked[:, c]] == c).double().cumsum(0)
        precision = found / torch.arange(1, len(found) + 1)
        best = precision.flip(0).cummax(0).values.flip(0)
        # found >= r * all, in whole numbers, because 0.3 * 10 is a little above 3 in floating point
        needed = torch.arange(RECALLS) * int(found[-1])
        precisions.append(best[torch.searchsorted((RECALLS - 1) * found.long(), needed)].mean())
    return 100 * torch.stack(precisions).mean().item()


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "top1": top1,
    "mean-per-class": mean_per_class,
    "map11": map11,
}


def accuracies(scores: Tensor, labels: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Return top-1 and top-5 accuracy with their intervals, under the keys of a protocol's JSON."""
    first, five = hits(scores, labels), hits(scores, labels, k=5)
    return {
        "top1": percent(first),
        "top1_interval": interval(first, seed=seed),
        "top5": percent(five),
        "top5_interval": interval(five, seed=seed),
    }


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add --metric."""
    parser.add_argument(
        "--metric", choices=list(METRICS), default="top1", help="score that chooses settings, and is reported"
    )
