"""Know the weighted nearest-neighbour classifier over frozen representations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config import require
from fastbyol.evaluate.features import Features

K = 20
TEMPERATURE = 0.07
SIMILARITIES = 1 << 25  # at a time: 128 MiB


def check(k: int, bank_images: int, *, temperature: float) -> None:
    """Raise ConfigError unless k neighbours of a bank of that many images can vote."""
    require(1 <= k <= bank_images, f"k is {k}; give a number from 1 to the {bank_images} images of the bank")
    require(0 < temperature < math.inf, f"temperature is {temperature}; give more than 0")


@torch.inference_mode()
def predict(bank: Features, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """Rank classes for queries [N, F]: int64 [N, classes], best first.

    Each of the k bank images nearest in cosine votes for its class with exp(similarity / temperature); k is at most
    the size of the bank. Source: Wu et al. 2018, section 3.4.
    """
    check(k, len(bank.labels), temperature=temperature)
    keys = F.normalize(bank.values, dim=1).T
    classes = int(bank.labels.max()) + 1
    ranked = []
    for chunk in torch.split(F.normalize(queries, dim=1), max(SIMILARITIES // len(bank.labels), 1)):
        nearest = (chunk @ keys).topk(k)
        votes = torch.zeros(len(chunk), classes, dtype=torch.float64)
        weights = ((nearest.values - 1) / temperature).double().exp()
        votes.scatter_add_(1, bank.labels[nearest.indices], weights)
        ranked.append(votes.argsort(dim=1, descending=True, stable=True))
    return torch.cat(ranked)


def top1(bank: Features, queries: Features, *, k: int = K, temperature: float = TEMPERATURE) -> float:
    """Score the classifier: percent of queries whose best class is right, in [0, 100]."""
    best = predict(bank, queries.values, k=k, temperature=temperature)[:, 0]
    return 100 * (best == queries.labels).double().mean().item()
