"""Query images chosen without a look at the result, and their nearest neighbours under an encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.evaluate.features import Features, evenly_spaced


@dataclass(frozen=True)
class Neighbours:
    """One query image and its nearest images, nearest first: of the validation and the training file, or of one file.

    query, bank: sample numbers of the files; similarities: cosines, one per entry of `bank`.
    """

    query: int
    bank: tuple[int, ...]
    similarities: tuple[float, ...]


@torch.inference_mode()
def pick(bank: Features, queries: Features, *, rows: int, k: int, bank_images: int | None = None) -> list[Neighbours]:
    """Choose up to `rows` queries by their labels alone and find the k bank images nearest to each, by cosine.

    The queries are the first image of each of `rows` evenly spaced classes; with fewer classes than rows, second images
    follow, and so on. bank_images: the number of images in the training file if features.extract(limit=...) took a part
    of them; None if the bank is the whole file.
    """
    chosen = first_of_classes(queries.labels.numpy(), rows=rows)
    keys = F.normalize(bank.values, dim=1)
    nearest = (F.normalize(queries.values[torch.from_numpy(chosen)], dim=1) @ keys.T).topk(min(k, len(keys)))
    count = len(bank.labels)
    whole = count if bank_images is None else bank_images
    return [
        Neighbours(query, tuple(place * whole // count for place in places), tuple(similarities))
        for query, places, similarities in zip(
            chosen.tolist(), nearest.indices.tolist(), nearest.values.tolist(), strict=True
        )
    ]


@torch.inference_mode()
def pick_without_labels(values: Tensor, samples: NDArray[np.int64], *, rows: int, k: int) -> list[Neighbours]:
    """Choose up to `rows` evenly spaced images of representations [N, F] and find the k others nearest to each.

    samples: the sample numbers [N] of the images.
    """
    chosen = torch.from_numpy(evenly_spaced(len(values), rows))
    keys = F.normalize(values, dim=1)
    cosines = keys[chosen] @ keys.T
    cosines[torch.arange(len(chosen)), chosen] = -torch.inf
    nearest = cosines.topk(min(k, len(keys) - 1))
    numbers = samples.tolist()
    return [
        Neighbours(numbers[query], tuple(numbers[place] for place in places), tuple(similarities))
        for query, places, similarities in zip(
            chosen.tolist(), nearest.indices.tolist(), nearest.values.tolist(), strict=True
        )
    ]


def first_of_classes(labels: NDArray[np.int64], *, rows: int) -> NDArray[np.int64]:
    """Choose up to `rows` positions of labels [N]: the first of each class, then the second; classes ascending."""
    order = np.argsort(labels, kind="stable")
    grouped = labels[order]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    turn = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    rounds = order[np.lexsort((grouped, turn))]
    classes = len(starts)
    if classes > rows:
        rounds = rounds[:classes][np.arange(rows) * classes // rows]
    return rounds[:rows]
