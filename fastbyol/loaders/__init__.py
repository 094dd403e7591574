"""The batch that every loader yields, and the choice of a loader by name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Protocol

import torch

from fastbyol.beton import Reader
from fastbyol.config import ON_ERROR
from fastbyol.errors import ConfigError, require
from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders.batch import PREFETCH, Batch
from fastbyol.loaders.resized import ResizedReader
from fastbyol.order import Rows
from fastbyol.ranges import BATCHES_MAX, COUNT_MAX, THREADS_MAX, check_number
from fastbyol.registry import LOADERS

__all__ = ["PREFETCH", "Batch", "Loader", "crop_by_dali", "decoding_threads", "default_workers", "load"]
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia.dali"}  # that a loader of ours needs beside fastbyol's own
RESIZING = ("native", "memory")  # loaders that decode a ResizedReader's images at its sizes
OTHER_THREADS = 2  # of a rank beside its decoders: one launches the GPU's work, one copies to the GPU
FEW_WORKERS = 2  # enough on a CPU, where a step takes many times as long as decoding its batch


class Loader(Protocol):
    """The function that a name among LOADERS stands for; see load() for its arguments.

    Pixels may lie on the host or on `device`; load() copies them there. A function decoding_threads(reader, *, workers)
    of the same module tells how many threads decode; without one it is `workers`.
    """

    def __call__(
        self,
        reader: Reader,
        batches: Iterable[Rows],
        *,
        workers: int,
        prefetch: int,
        on_error: str,
        device: torch.device,
        processes: int,
    ) -> Generator[Batch, None, None]:
        """Yield the decoded batches in the given order."""
        ...


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
    """Yield the decoded batches in the given order, with their pixels on `device`, by the loader of this name.

    `workers` threads decode up to `prefetch` batches in advance. A sample that does not decode raises BetonError with
    its index when its batch is due (on_error "fail"), or is replaced by the next sample of the file that does ("skip").
    name: of LOADERS, or "module:attribute" of a Loader. reader: of a file; also a ResizedReader for the loaders of
    RESIZING. processes: the number of processes on this machine that load at the same time; loader memory holds the
    decoded file in each. Closing the generator ends the threads. Raises ConfigError for settings that cannot be used
    and for a missing package, before anything is decoded.
    """
    _check_settings(name, workers=workers, prefetch=prefetch, on_error=on_error, processes=processes)
    require(
        name in RESIZING or not isinstance(reader, ResizedReader),
        f"loader {name} decodes images in the size of the file; give loader {' or '.join(RESIZING)} to resize them",
    )
    target, loader = _with_index(device), _find(name)
    settings = {"workers": workers, "prefetch": prefetch, "processes": processes}
    if name in LOADERS:
        loaded = loader(reader, batches, **settings, on_error=on_error, device=target)
    else:
        rows = iter(batches)
        built = LOADERS.build(name, reader, rows, **settings, on_error=on_error, device=target)
        loaded = _check_batches(name, built, rows)
    return _to_device(loaded, target)


def default_workers(device: str, *, cores: int, local_ranks: int = 1) -> int:
    """Return the default number of decoding threads of a rank; device: "cuda" or "cpu"; cores: of all local ranks.

    With a GPU these are the rank's cores less the two threads that feed the GPU. On a CPU the step computes on the same
    cores, so two are enough. The least is two also on two or three cores: decoders sleep while their queue is full.
    """
    own_cores = max(cores // local_ranks, 1)
    few = min(own_cores, FEW_WORKERS)
    return max(own_cores - OTHER_THREADS, few) if device == "cuda" else few


def decoding_threads(name: str, reader: Reader, *, workers: int) -> int | None:
    """Return the number of threads that decode a file in the loader of this name; None where more would not help.

    Raises ConfigError where its package is missing.
    """
    module = sys.modules[_find(name).__module__]
    if not hasattr(module, "decoding_threads"):
        return workers
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
    """Yield the batches with DALI's crops of all views in place of their images; see loaders.dali_crop.

    Raises ConfigError where DALI is missing.
    """
    with _need(PACKAGES["dali"], extra="dali", flag="--crop"):
        module = importlib.import_module("fastbyol.loaders.dali_crop")
    target = _with_index(device)
    return _to_device(module.crop(batches, draw, crop_px=crop_px, workers=workers, device=target), target)


def _check_batches(
    name: str, loaded: Generator[Batch, None, None], rows: Iterator[Rows]
) -> Generator[Batch, None, None]:
    """Hand on the batches of a loader from elsewhere; raise ConfigError for other objects, and where one is missing."""
    if not inspect.isgenerator(loaded):
        raise ConfigError(f"loader {name!r} returned a {type(loaded).__name__}; write it as a generator of batches")
    with closing(loaded):
        for batch in loaded:
            if not isinstance(batch, Batch):
                raise ConfigError(f"loader {name!r} yielded a {type(batch).__name__}; yield a fastbyol.loaders.Batch")
            yield batch
    if next(rows, None) is not None:
        raise ConfigError(f"loader {name!r} ended, but there are more rows; yield a batch for each of them")


def _with_index(device: torch.device | str) -> torch.device:
    """Return the device with the current GPU's index: without it, other threads would use the first GPU."""
    indexed = torch.device(device)
    if indexed.type == "cuda" and indexed.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return indexed


def _to_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Copy the batches' pixels to a GPU, or hand pixels that another thread put there to this thread's stream."""
    if device.type == "cpu":
        return batches
    transfer = importlib.import_module("fastbyol.loaders.prefetch")
    on_gpu: Generator[Batch, None, None] = transfer.to_gpu(batches, device)
    return on_gpu


def _find(name: str) -> Loader:
    """Import the loader of this name; raise ConfigError, with what to install, where a package is missing."""
    with _need(PACKAGES.get(name), extra=name, flag="--loader"):
        loader: Loader = LOADERS.find(name)
    return loader


@contextmanager
def _need(package: str | None, *, extra: str, flag: str) -> Iterator[None]:
    """Raise ConfigError, with what to install, where an import in the with-block fails for want of the package."""
    try:
        yield
    except ImportError as error:
        if package is None or (error.name or "").partition(".")[0] == "fastbyol":
            raise
        is_missing = isinstance(error, ModuleNotFoundError)
        remedy = f"pip install 'fastbyol[{extra}]'" if is_missing else "it is installed: mend what its import lacks"
        raise ConfigError(
            f"{flag} {extra} needs the package {package}, which cannot be imported ({error}); "
            f"{remedy}, or choose another {flag}"
        ) from error


def _check_settings(name: str, *, workers: int, prefetch: int, on_error: str, processes: int) -> None:
    LOADERS.check(name)
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error is {on_error!r}; choose one of {', '.join(ON_ERROR)}")
    for setting, value, most in (
        ("workers", workers, THREADS_MAX),
        ("prefetch", prefetch, BATCHES_MAX),
        ("processes", processes, COUNT_MAX),
    ):
        check_number(setting, value, 1, most)
