"""The timed loaders, ours and others': from stored JPEGs to what the host hands on for two-view training.

Our loaders hand whole images on, decoded once, and leave crops, colours and blur to the GPU. What the others hand on
differs, and is part of their names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import rivals, waiting
from benchmarks.cases.compare import WrongResult
from benchmarks.cases.photographs import Job, Photographs
from benchmarks.cases.rivals import CROP_PX, TwoViews
from benchmarks.harness import Absent, Case, Ready
from fastbyol import loaders, views
from fastbyol.beton import Reader
from fastbyol.errors import ConfigError
from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders.batch import Batch
from fastbyol.loaders.libnvjpeg import NvJpegError
from fastbyol.loaders.resized import at_side
from fastbyol.order import Rows
from fastbyol.recipes import PAPER_VIEWS
from fastbyol.system.device import queue_copy

LEVELS_APART = 4.0  # on average: ffcv asks for libjpeg-turbo's fast DCT, and nvJPEG may repeat chroma
MANY, FEW = 8, 1  # batches a run and a thread (torch's DataLoader gives a batch to one of its processes)
FFCV_COLORS = "ffcv: decode and crop twice, flip, jitter without hue"
FFCV_COLORS_SIZES = ("500 px", "as stored")  # ffcv takes up to 40 s to compile it, for every file anew
SIDE_PX = 160  # of the short sides of images that loader memory keeps small


class Ours(NamedTuple):
    """A loader of ours, and the short side at most of its images in pixels; None as in the file."""

    loader: str
    side: int | None = None


OURS = {
    "fastbyol native: decode": Ours("native"),
    f"fastbyol native: decode, resize to {SIDE_PX} px": Ours("native", SIDE_PX),
    "fastbyol memory: look up, decoded before": Ours("memory"),
    f"fastbyol memory: look up, {SIDE_PX} px, decoded before": Ours("memory", SIDE_PX),
    "fastbyol ffcv: decode": Ours("ffcv"),
    "fastbyol dali: decode": Ours("dali"),
    "fastbyol nvjpeg: decode on the GPU": Ours("nvjpeg"),
}
ENDLESS = ("memory", "nvjpeg")  # memory has decoded before; nvJPEG's start would be most of a run
THEIRS: dict[str, tuple[Callable[[Job], Callable[[], TwoViews]], int]] = {
    "ffcv: decode and crop twice": (rivals.ffcv_crops, MANY),
    FFCV_COLORS: (rivals.ffcv_colors, FEW),
    "dali: decode, both views": (rivals.dali, FEW),
    "torchvision and Pillow's blur: decode, both views": (rivals.torchvision_as_solo_learn, FEW),
    "torchvision: decode, both views": (rivals.torchvision_alone, FEW),
    "lightly: decode, both views": (rivals.lightly, FEW),
}


def cases(source: Path | None, *, name: str | None, device: str, batch_size: int, workers: int) -> Iterator[Case]:
    """Load the images at each size, by one thread and by `workers`."""
    photographs = Photographs(source, name)
    for size, threads in itertools.product(photographs.sizes, sorted({1, workers})):
        shape = f"{photographs.name}, {size}, {threads} thread{'s' if threads > 1 else ''}"
        for implementation, batches, prepare in _implementations(device):
            if implementation == FFCV_COLORS and size not in FFCV_COLORS_SIZES:
                continue
            job = Job(photographs, size, threads, batch_size, batches * threads, device)
            yield Case("loader", shape, implementation, partial(prepare, job), images=job.images, dtype="uint8")
    if device == "cuda":
        yield from waiting.cases(photographs, list(OURS.values()), workers=workers)
    else:
        print("loader: no GPU is used; the share of a ResNet-50 step spent waiting for data is not measured")


def _implementations(device: str) -> Iterator[tuple[str, int, Callable[[Job], Ready]]]:
    """List the loaders: name, batches of a run, function that prepares it."""
    for name, ours in OURS.items():
        if ours.loader != "nvjpeg" or device == "cuda":
            yield name, MANY, partial(_ours, ours, has_views=False)
    if device == "cpu":
        yield "fastbyol native: decode, both views in plain torch", FEW, partial(_ours, Ours("native"), has_views=True)
    else:
        for name, ours in OURS.items():
            yield f"{name}, both views on the GPU", MANY, partial(_ours, ours, has_views=True)
    for name, (prepare, batches) in THEIRS.items():
        yield name, batches, partial(_theirs, prepare)


def _ours(ours: Ours, job: Job, *, has_views: bool) -> Ready:
    """Prepare one of our loaders; each run is one of its own, so that nothing is decoded ahead for the next.

    Loaders of ENDLESS go on from run to run, and see an epoch here, in which memory decodes.
    """
    name, reader = ours.loader, at_side(job.reader(), ours.side)

    def load(batches: Iterable[Rows]) -> Iterator[Batch]:
        with _torch_threads(job.threads):
            return loaders.load(name, reader, batches, workers=job.threads, device=job.device)

    try:
        endless = load(job.stream() if name in ENDLESS else [])
    except (ConfigError, ImportError) as error:
        if isinstance(error, ConfigError) and not isinstance(error.__cause__, ImportError | NvJpegError):
            raise
        raise Absent(str(error)) from error
    if name in ENDLESS:
        for _ in itertools.islice(endless, -(-len(reader) // job.batch_size)):
            pass

    def run() -> None:
        with _torch_threads(job.threads):
            seen = 0
            for batch in itertools.islice(endless, job.batches) if name in ENDLESS else load(job.rows()):
                seen += len(batch.indices)
                if has_views:
                    _apply_views(batch, job)
            _require(seen == job.images, f"{seen} of {job.images} images came")

    return Ready(run, partial(_check, load, job, ours.side))


def _apply_views(batch: Batch, job: Job) -> Tensor:
    """Make both views as training does, by kernels on a GPU and in plain torch without."""
    drawn = views.draw(PAPER_VIEWS, seed=0, epochs=batch.epochs, indices=batch.indices, sizes=batch.sizes.numpy())
    tensors = (queue_copy(tensor, job.device) for tensor in (batch.pixels, batch.offsets, batch.sizes, drawn.packed))
    pixels, offsets, sizes, packed = tensors
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    return views.apply(pixels, offsets, sizes, ViewParams(packed), crop_px=CROP_PX, dtype=dtype)


def _check(load: Callable[[Iterable[Rows]], Iterator[Batch]], job: Job, side: int | None) -> None:
    """Raise WrongResult unless the first batch shows the right samples, with about the pixels native decodes."""
    rows = job.rows()[0]
    (batch,) = load([rows])
    _require((batch.indices == rows.indices).all(), "the samples are not those asked for")
    wanted = _decoded(at_side(job.reader(), side), rows)
    for place, (height, width) in enumerate(batch.sizes.tolist()):
        image, other = (each.pixels[each.offsets[place] :][: height * width * 3].float() for each in (batch, wanted))
        difference = (image.cpu() - other).abs().mean().item()
        _require(difference < LEVELS_APART, f"image {place} is {difference:.1f} levels from native's")


def _decoded(reader: Reader, rows: Rows) -> Batch:
    from fastbyol.loaders import native  # noqa: PLC0415  # its JPEG codec may be missing beside a bare torch

    return native.decode(reader, rows)


def _theirs(prepare: Callable[[Job], Callable[[], TwoViews]], job: Job) -> Ready:
    """Prepare a rival; every run is checked for the number and the shape of its views, and that the two differ."""
    with _torch_threads(job.threads):
        epoch = prepare(job)

    def run() -> None:
        with _torch_threads(job.threads):
            seen = 0
            for views_ in epoch():
                seen += len(views_[0])
                first, second = (np.asarray(view[0]) for view in views_)
                is_view = sorted(first.shape) == sorted(second.shape) == [3, CROP_PX, CROP_PX]
                _require(is_view, f"views have shapes {first.shape} and {second.shape}")
                _require((first != second).any(), "both views are the same")
            _require(seen == job.images, f"{seen} of {job.images} images came")

    return Ready(run)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads in the block, whatever a rival sets (importing ffcv sets one)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require(claim: bool | np.bool_, fault: str) -> None:
    if not claim:
        raise WrongResult(fault)
