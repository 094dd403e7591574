"""Know the nearest-neighbour classifier over frozen representations, weighted and plain, for many k at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastbyol.config import require
from fastbyol.evaluate.features import Features

K = 20
TEMPERATURE = 0.07
BANK_CHUNK = 1 << 14  # keys at a time
SIMILARITIES = 1 << 23  # at a time: 32 MiB, near the caches of a CPU
VOTES = 1 << 24  # at a time: 128 MiB


class Cell(NamedTuple):
    """Give the top-1 of one choice of k and temperature, in percent; temperature None is the plain vote."""

    k: int
    temperature: float | None
    top1: float


def check(k: int, bank_images: int, *, temperature: float) -> None:
    """Raise ConfigError unless k neighbours of a bank of that many images can vote."""
    require(1 <= k <= bank_images, f"k is {k}; give a number from 1 to the {bank_images} images of the bank")
    require(0 < temperature < math.inf, f"temperature is {temperature}; give more than 0")


@torch.inference_mode()
def nearest(bank: Tensor, queries: Tensor, k: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Find the k rows of bank [M, F] nearest in cosine to each query [N, F]: similarities and indices [N, k].

    Best first; k is at most M. Computed on `device` a piece of the bank and of the queries at a time, so that beside
    the arguments and the result only some 100 MB are held, whatever M and N. Results lie on the CPU.
    """
    check(k, len(bank), temperature=TEMPERATURE)
    rows = max(SIMILARITIES // min(BANK_CHUNK, len(bank)), 1)
    best = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    bar = tqdm(total=len(bank), desc="neighbours", unit="keys", delay=2, leave=False, disable=None)
    with bar:
        for first in range(0, len(bank), BANK_CHUNK):
            keys = F.normalize(bank[first : first + BANK_CHUNK].to(device), dim=1).T
            merged = [
                _merge(F.normalize(chunk.to(device), dim=1) @ keys, values.to(device), places.to(device), first, k)
                for chunk, values, places in zip(
                    torch.split(queries, rows), torch.split(best[0], rows), torch.split(best[1], rows), strict=True
                )
            ]
            best = torch.cat([values for values, _ in merged]), torch.cat([places for _, places in merged])
            bar.update(keys.shape[1])
    return best


def _merge(similarities: Tensor, values: Tensor, places: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """Join the best so far with those of a piece of the bank that begins at key `first`."""
    here = similarities.topk(min(k, similarities.shape[1]))
    values, places = torch.cat((values, here.values), 1), torch.cat((places, here.indices + first), 1)
    kept = values.topk(min(k, values.shape[1]))
    return kept.values.cpu(), places.gather(1, kept.indices).cpu()


def vote(similarities: Tensor, labels: Tensor, *, classes: int, temperature: float | None) -> Tensor:
    """Sum the votes of neighbours [N, k] with labels [N, k]: float64 [N, classes].

    A neighbour's vote is exp(similarity / temperature), or 1 where temperature is None.
    """
    ones = torch.ones(similarities.shape, dtype=torch.float64)
    weights = ones if temperature is None else ((similarities - 1).double() / temperature).exp()
    return torch.zeros(len(labels), classes, dtype=torch.float64).scatter_add_(1, labels, weights)


@torch.inference_mode()
def predict(bank: Features, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """Rank classes for queries [N, F]: int64 [N, classes], best first.

    Each of the k bank images nearest in cosine votes for its class with exp(similarity / temperature); k is at most
    the size of the bank. Source: Wu et al. 2018, section 3.4.
    """
    check(k, len(bank.labels), temperature=temperature)
    similarities, indices = nearest(bank.values, queries, k)
    votes = vote(similarities, bank.labels[indices], classes=int(bank.labels.max()) + 1, temperature=temperature)
    return votes.argsort(dim=1, descending=True, stable=True)


@torch.inference_mode()
def sweep(
    bank: Features, queries: Features, ks: Sequence[int], temperatures: Sequence[float], *, device: str = "cpu"
) -> list[Cell]:
    """Score every k with every temperature and with the plain vote, from one search for the largest k.

    Cells stand in the order of ks, for each k the temperatures, then None. Classes with equal votes are ranked by
    their numbers. Raises ConfigError for a k or temperature that cannot vote.
    """
    for k in ks:
        check(k, len(bank.labels), temperature=TEMPERATURE)
    for temperature in temperatures:
        check(1, 1, temperature=temperature)
    choices: tuple[float | None, ...] = (*temperatures, None)
    similarities, indices = nearest(bank.values, queries.values, max(ks), device=device)
    labels, classes = bank.labels[indices], int(bank.labels.max()) + 1
    rows = max(VOTES // classes, 1)
    cells = []
    for k in ks:
        for choice in choices:
            right = 0
            for s, voters, wanted in zip(
                torch.split(similarities, rows),
                torch.split(labels, rows),
                torch.split(queries.labels, rows),
                strict=True,
            ):
                votes = vote(s[:, :k], voters[:, :k], classes=classes, temperature=choice)
                right += int((votes.argmax(1) == wanted).sum())
            cells.append(Cell(k, choice, 100 * right / len(queries.labels)))
    return cells


def top1(
    bank: Features, queries: Features, *, k: int = K, temperature: float = TEMPERATURE, device: str = "cpu"
) -> float:
    """Score the weighted vote, computed on `device`: percent of queries whose best class is right, in [0, 100]."""
    return sweep(bank, queries, (k,), (temperature,), device=device)[0].top1
