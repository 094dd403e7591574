"""Measures of representations that need no labels: RankMe, effective rank, alignment and uniformity."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.errors import require
from fastbyol.evaluate.features import Features, OutOfTime, check_features, evenly_spaced
from fastbyol.evaluate.images import InputSettings, ViewBatches, center_views, random_crops
from fastbyol.evaluate.protocol import Files, Job, Protocol, add_seed
from fastbyol.model.parts import Encoder
from fastbyol.order import Rows
from fastbyol.storage.scores import Scores
from fastbyol.system.command_line import whole_number
from fastbyol.system.progress import Progress

IMAGES = 25_600  # RankMe's number: its appendix G finds the estimate settled there
RANKME_EPS = 1e-7  # added to each share of the singular values; RankMe, equation 1
ALPHA, T = 2.0, 2.0  # Wang & Isola's exponent of distances and scale of the Gaussian potential
SIMILARITIES = 1 << 23  # of pairs at a time: 32 MiB


class Quality(NamedTuple):
    """Measures of one encoder on `images` images.

    rankme, effective_rank: from 1 to the smaller of images and length of a representation; higher is less collapsed.
    alignment: 0 where two crops of an image are represented alike. uniformity: 0 where all images are, less where they
    spread over the sphere.
    """

    rankme: float
    effective_rank: float
    alignment: float
    uniformity: float
    images: int


def rankme(singular_values: Tensor, *, eps: float = RANKME_EPS) -> float:
    """Compute RankMe of a matrix from its singular values [K]: the exponential of the entropy of their shares.

    Source: Garrido et al. 2022 (arXiv 2210.02885), equation 1.
    """
    shares = singular_values / singular_values.sum() + eps
    return math.exp(-(shares * shares.log()).sum().item())


def effective_rank(singular_values: Tensor) -> float:
    """Compute the effective rank of a matrix from its singular values [K]; a share of 0 adds nothing to the entropy.

    Source: Roy & Vetterli 2007, definition 1.
    """
    return math.exp(torch.special.entr(singular_values / singular_values.sum()).sum().item())


def alignment(first: Tensor, second: Tensor, *, alpha: float = ALPHA) -> float:
    """Compute the mean distance to the power alpha between the directions of pairs of rows [N, F].

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.1.
    """
    distances = (F.normalize(first, dim=1) - F.normalize(second, dim=1)).norm(dim=1)
    return float(distances.pow(alpha).mean())


def uniformity(values: Tensor, *, t: float = T) -> float:
    """Compute the log of the mean of exp(-t distance^2) over all pairs of different rows [N, F], by their directions.

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.2.
    """
    directions, count = F.normalize(values, dim=1), len(values)
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for rows in torch.split(torch.arange(count, device=values.device), max(SIMILARITIES // count, 1)):
        potentials = ((directions[rows] @ directions.T - 1) * (2 * t)).exp_()  # the squared distance is 2 - 2 cosine
        potentials[torch.arange(len(rows)), rows] = 0
        total += potentials.sum(dtype=torch.float64)
    return math.log(total.item() / (count * (count - 1)))


def roots_of_gram(matrix: Tensor) -> Tensor:
    """Compute the singular values of a float64 matrix [N, F] from its smaller Gram matrix.

    Those below 1e-8 of the largest are not resolved, which RankMe's epsilon hides. At [2048, 2048] this takes 1.0 s of
    a core, svdvals 3.6 s.
    """
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp(min=0).sqrt()


def has_collapsed(values: Tensor) -> bool:
    """Tell whether every image has the same representation [N, F]."""
    return bool((values == values[0]).all())


@torch.inference_mode()
def measure(
    values: Tensor, pairs: tuple[Tensor, Tensor], *, spectrum: Callable[[Tensor], Tensor] = torch.linalg.svdvals
) -> Quality:
    """Measure representations [N, F] of whole images, and for the alignment those of two crops of images, in float64.

    The effective rank is that of the centred representations, so that what all have in common is no dimension.
    spectrum: computes singular values.
    """
    require(
        not has_collapsed(values),
        "every image has the same representation: the encoder has collapsed; train it again",
    )
    wide = values.double()
    return Quality(
        rankme=rankme(spectrum(wide)),
        effective_rank=effective_rank(spectrum(wide - wide.mean(0))),
        alignment=alignment(*(each.double() for each in pairs)),
        uniformity=uniformity(values),
        images=len(values),
    )


@torch.inference_mode()
def _represent(
    encoder: Encoder,
    views: ViewBatches,
    count: int,
    inputs: InputSettings,
    *,
    label: str,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Compute the representations [count, F] of batches of views, float32 on the inputs' device; stop: see stream."""
    values, done = torch.empty(count, encoder.features, device=inputs.device), 0
    bar = Progress(views, total=math.ceil(count / inputs.batch), desc=label, unit="batches")
    for images, here in inputs.threads.units(bar, "represent"):
        if stop is not None and stop():
            raise OutOfTime(f"time ran out after {done} of {count} images")
        with inputs.precision():
            values[done : done + len(here)] = encoder(images)[: len(here)]
        done += len(here)
    return values


def represent_pairs(
    encoder: Encoder,
    reader: Reader,
    indices: NDArray[np.int64],
    inputs: InputSettings,
    *,
    seed: int,
    label: str,
    stop: Callable[[], bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the representations of two random crops and flips of each image at `indices`; the encoder keeps its mode.

    The draws are a function of (seed, image). When `stop` returns True, OutOfTime is raised.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        crops = [random_crops(reader, _rows(indices, epoch=n, batch=inputs.batch), inputs, seed=seed) for n in range(2)]
        first, second = (_represent(encoder, views, len(indices), inputs, label=label, stop=stop) for views in crops)
    finally:
        encoder.train(was_training)
    return first, second


def _rows(indices: NDArray[np.int64], *, epoch: int, batch: int) -> list[Rows]:
    parts = (indices[first : first + batch] for first in range(0, len(indices), batch))
    return [Rows(part, np.full_like(part, epoch)) for part in parts]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=whole_number, default=IMAGES, metavar="N", help="evenly spaced images to represent, at most"
    )
    add_seed(parser)


def _prepare(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, Job]:
    """Measure centre views and, for the alignment, two random crops and flips of each image."""
    reader, _ = files
    indices = evenly_spaced(len(reader), args.images)
    require(len(indices) >= 2, f"{len(indices)} image to compare; measures need at least 2: give more --images")

    def job(encoder: Encoder, label: str) -> Scores:
        encoder.eval()
        whole = _represent(encoder, center_views(reader, indices, inputs), len(indices), inputs, label=label)
        first, second = represent_pairs(encoder, reader, indices, inputs, seed=args.seed, label=label)
        for values in (whole, first, second):
            check_features(Features(values, torch.zeros(len(values), dtype=torch.int64)), label)
        return measure(whole, (first, second))._asdict()

    return {"seed": args.seed}, job


PROTOCOL = Protocol(_add_arguments, _prepare, has_val=False)
