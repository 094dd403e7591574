"""Know what every loader yields, decoded images of one batch in one buffer, and which loader a name means."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.config import LOADERS, ON_ERROR, ConfigError
from fastbyol.kernels.view_params import ViewParams
from fastbyol.order import Rows

PACKAGES = {"native": None, "memory": None, "ffcv": "ffcv", "dali": "nvidia.dali"}  # what a loader needs beside ours
PREFETCH = 2  # batches decoded before they are asked for
OTHER_THREADS = 2  # of a rank beside its decoders: the one that feeds the GPU and the one that copies to it
FEW_WORKERS = 2  # enough on a CPU, where a step outlasts the decoding of its batch many times over


@dataclass(frozen=True)
class Batch:
    """Hold B decoded images of any sizes.

    indices, epochs: int64 [B]; labels: int64 [B], or None where the file has none; pixels: uint8 [bytes], RGB rows of
    every image without gaps inside it, to be read only; offsets: int64 [B], where in `pixels` each image begins; sizes:
    int64 [B, 2], height and width, on the host as offsets are; skipped: int64 [S], the samples asked for that do not
    decode: the next of the file that does stands in the place of each.
    """

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    skipped: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def load(
    name: str,
    reader: Reader,
    batches: Iterable[Rows],
    *,
    workers: int,
    prefetch: int = PREFETCH,
    on_error: str = "fail",
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> Generator[Batch, None, None]:
    """Yield the decoded batches in the order given, each with its pixels on `device`, through the loader of this name.

    `workers` threads decode up to `prefetch` batches in advance. A sample that does not decode raises BetonError with its
    index at its batch (on_error "fail"), or is replaced by the next of the file that does ("skip"). `processes` of this
    machine load at the same time; loader memory keeps the file in each. Closing the generator ends the threads. Raises
    ConfigError for what cannot be used, a missing package included, before anything is decoded.
    """
    _check(name, workers=workers, prefetch=prefetch, on_error=on_error, processes=processes)
    module = _imported(name, package=PACKAGES[name], extra=name, flag="--loader")
    place = _place(device)
    loader: Callable[..., Generator[Batch, None, None]] = module.load
    if name == "memory":
        loader = partial(loader, processes=processes)
    return _moved(loader(reader, batches, workers=workers, prefetch=prefetch, on_error=on_error, device=place), place)


def default_workers(device: str, *, cores: int, local_ranks: int = 1) -> int:
    """Return how many threads a rank decodes with where nobody says: device "cuda" or "cpu", cores all ranks share.

    Before a GPU they are a rank's share of the cores without the two that feed the GPU. On a CPU the step computes on
    the same cores, so two are enough, and a core that decodes in advance is a core that computes later. Two remain on
    two or three cores, too: decoders sleep while their queue is full.
    """
    share = max(cores // local_ranks, 1)
    few = min(share, FEW_WORKERS)
    return max(share - OTHER_THREADS, few) if device == "cuda" else few


def decoding_threads(name: str, reader: Reader, *, workers: int) -> int | None:
    """Return how many threads the loader of this name decodes a file with; None where asking for more changes nothing.

    Raises ConfigError where its package is missing.
    """
    module = _imported(name, package=PACKAGES[name], extra=name, flag="--loader")
    count: int | None = module.decoding_threads(reader, workers=workers)
    return count


def crop_by_dali(
    batches: Generator[Batch, None, None],
    draw: Callable[[Batch], ViewParams],
    *,
    crop_px: int,
    workers: int,
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """Yield the batches with both views' crops, made by DALI, in place of their images; see loaders.dali_crop.

    Raises ConfigError where DALI is missing.
    """
    module = _imported("dali_crop", package="nvidia.dali", extra="dali", flag="--crop")
    place = _place(device)
    return _moved(module.crop(batches, draw, crop_px=crop_px, workers=workers, device=place), place)


def _place(device: torch.device | str) -> torch.device:
    """Name the GPU that is meant, too: other threads would take the machine's first."""
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def _moved(batches: Generator[Batch, None, None], place: torch.device) -> Generator[Batch, None, None]:
    """Bring the pixels of batches to a GPU, or hand those that another thread left there to this one's stream."""
    if place.type == "cpu":
        return batches
    transfer = importlib.import_module("fastbyol.loaders.transfer")
    moved: Generator[Batch, None, None] = transfer.to_gpu(batches, place)
    return moved


def _imported(name: str, *, package: str | None, extra: str, flag: str) -> ModuleType:
    """Import a module of this folder; tell what to install where the package it needs is missing."""
    try:
        return importlib.import_module(f"fastbyol.loaders.{name}")
    except ImportError as error:
        if package is None or (error.name or "").partition(".")[0] == "fastbyol":
            raise
        raise ConfigError(
            f"{flag} {extra} needs the package {package}, and importing it failed ({error}); "
            f"pip install 'fastbyol[{extra}]', or choose another {flag}"
        ) from error


def _check(name: str, *, workers: int, prefetch: int, on_error: str, processes: int) -> None:
    if name not in LOADERS:
        raise ConfigError(f"no loader {name!r}; choose one of {', '.join(LOADERS)}")
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error is {on_error!r}; choose one of {', '.join(ON_ERROR)}")
    for setting, value in (("workers", workers), ("prefetch", prefetch), ("processes", processes)):
        if value < 1:
            raise ConfigError(f"{setting} is {value}; give at least 1")
