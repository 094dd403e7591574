"""A k-nearest-neighbour classifier on frozen representations, with weighted and plain votes, for many k at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.errors import require
from fastbyol.evaluate.features import Features, represent_both
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.protocol import Files, Job, Protocol
from fastbyol.model.parts import Encoder
from fastbyol.storage.scores import Scores
from fastbyol.system.command_line import whole_number
from fastbyol.system.progress import Progress

K = 20
TEMPERATURE = 0.07
BANK_CHUNK = 1 << 14  # bank rows at a time
SIMILARITIES = 1 << 23  # at a time: 32 MiB, about the size of a CPU's caches
VOTES = 1 << 24  # at a time: 128 MiB


class KnnScore(NamedTuple):
    """The top-1 accuracy, in percent, of one k and temperature; a temperature of None means the plain vote."""

    k: int
    temperature: float | None
    top1: float


def check_settings(k: int, bank_images: int, *, temperature: float) -> None:
    """Raise ConfigError unless 1 <= k <= bank_images and the temperature is positive and finite."""
    require(1 <= k <= bank_images, f"k is {k}; give a number from 1 to the {bank_images} images of the bank")
    require(0 < temperature < math.inf, f"temperature is {temperature}; give more than 0")


@torch.inference_mode()
def nearest(bank: Tensor, queries: Tensor, k: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Find the k rows of bank [M, F] nearest in cosine to each query [N, F]: similarities and indices [N, k].

    Nearest first; k is at most M. Chunks of bank and queries are compared on `device`, so that about 100 MB are needed
    beside arguments and result, whatever M and N are. The result is on the CPU.
    """
    check_settings(k, len(bank), temperature=TEMPERATURE)
    rows = max(SIMILARITIES // min(BANK_CHUNK, len(bank)), 1)
    best = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    bar = Progress(total=len(bank), desc="neighbours", unit="keys")
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
    """Merge the best neighbours so far with those of the bank chunk that starts at row `first`."""
    here = similarities.topk(min(k, similarities.shape[1]))
    values, places = torch.cat((values, here.values), 1), torch.cat((places, here.indices + first), 1)
    merged = values.topk(min(k, values.shape[1]))
    return merged.values.cpu(), places.gather(1, merged.indices).cpu()


def vote(similarities: Tensor, labels: Tensor, *, classes: int, temperature: float | None) -> Tensor:
    """Sum the votes of the neighbours per class: similarities [N, k], labels [N, k] -> float64 [N, classes].

    A neighbour's vote is exp(similarity / temperature), or 1 if temperature is None.
    """
    ones = torch.ones(similarities.shape, dtype=torch.float64)
    weights = ones if temperature is None else ((similarities - 1).double() / temperature).exp()
    return torch.zeros(len(labels), classes, dtype=torch.float64).scatter_add_(1, labels, weights)


@torch.inference_mode()
def predict(bank: Features, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """Rank the classes of queries [N, F]: int64 [N, classes], best first.

    Each of the k bank images nearest in cosine votes for its class with exp(similarity / temperature). k is at most
    the size of the bank. Source: Wu et al. 2018, section 3.4.
    """
    check_settings(k, len(bank.labels), temperature=temperature)
    similarities, indices = nearest(bank.values, queries, k)
    votes = vote(similarities, bank.labels[indices], classes=int(bank.labels.max()) + 1, temperature=temperature)
    return votes.argsort(dim=1, descending=True, stable=True)


@torch.inference_mode()
def sweep(
    bank: Features, queries: Features, ks: Sequence[int], temperatures: Sequence[float], *, device: str = "cpu"
) -> list[KnnScore]:
    """Score every k with every temperature and with the plain vote, from one search for the largest k.

    Scores are ordered by k as in `ks`, and within a k as in `temperatures`, then None. Classes with equal votes are
    ranked by their numbers. Raises ConfigError for a k or temperature out of range, see check_settings.
    """
    for k in ks:
        check_settings(k, len(bank.labels), temperature=TEMPERATURE)
    for temperature in temperatures:
        check_settings(1, 1, temperature=temperature)
    choices: tuple[float | None, ...] = (*temperatures, None)
    similarities, indices = nearest(bank.values, queries.values, max(ks), device=device)
    labels, classes = bank.labels[indices], int(bank.labels.max()) + 1
    rows = max(VOTES // classes, 1)
    scores = []
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
            scores.append(KnnScore(k, choice, 100 * right / len(queries.labels)))
    return scores


def top1(
    bank: Features, queries: Features, *, k: int = K, temperature: float = TEMPERATURE, device: str = "cpu"
) -> float:
    """Return the top-1 accuracy of the weighted vote, in percent."""
    return sweep(bank, queries, (k,), (temperature,), device=device)[0].top1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--k", type=int, nargs="+", default=[K], metavar="N", help="voting neighbours; the first is the headline"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[TEMPERATURE],
        metavar="X",
        help="temperatures of the weighted vote; the first is the headline",
    )
    parser.add_argument("--bank", type=whole_number, metavar="N", help="training images to vote (default: all)")


def _prepare(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, Job]:
    """Score every k and temperature; the first of each is the headline, so that the scored images choose nothing."""
    for k, temperature in product(args.k, args.temperature):
        check_settings(k, min(args.bank or len(files[0]), len(files[0])), temperature=temperature)

    def job(encoder: Encoder, _: str) -> Scores:
        bank, queries = represent_both(encoder, files, inputs, bank=args.bank)
        cells = sweep(bank, queries, args.k, args.temperature, device=inputs.device)
        headline = {"top1": cells[0].top1, "k": cells[0].k, "temperature": cells[0].temperature}
        return {**headline, "bank": len(bank.labels), "cells": [cell._asdict() for cell in cells]}

    return {"bank": args.bank} if args.bank else {}, job


PROTOCOL = Protocol(_add_arguments, _prepare, scores_raw_pixels=True)
