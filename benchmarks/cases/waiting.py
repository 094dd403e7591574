"""The part of a training step that is spent waiting for data: steps behind each loader, against steps that never wait.

The share is 1 less the time of the steps on one batch, over and over, divided by the time of those behind the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import cycle, islice
from typing import Any

import torch

from benchmarks.cases.compare import WrongResult
from benchmarks.cases.photographs import Job, Photographs
from benchmarks.harness import Absent, Case, Ready
from fastbyol import loaders, optim, views
from fastbyol.config import Recipe
from fastbyol.errors import ConfigError
from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders.batch import Batch
from fastbyol.loaders.resized import at_side
from fastbyol.model.byol import BYOL
from fastbyol.recipes import named
from fastbyol.system.device import queue_copy
from fastbyol.train import step

BATCH, STEPS = 256, 32  # a run begins with the batches decoded since the last one, two as a rule
RATES = {"lr": 0.1, "tau": 0.99}

Train = Callable[[Batch], object]


def cases(photographs: Photographs, chosen: Sequence[tuple[str, int | None]], *, workers: int) -> Iterator[Case]:
    """Compare loaders behind the ResNet-50 of imagenet_rn50 on a GPU, at each size.

    chosen: the loaders by name, each with the short side at most of its images in pixels, None as in the file.
    """
    recipe = named("imagenet_rn50")
    for size in photographs.sizes:
        job = Job(photographs, size, workers, BATCH, STEPS, "cuda")
        shape = f"ResNet-50, batch {BATCH}, {photographs.name}, {size}, {workers} threads"
        yield Case("waiting", shape, "no loader: views, step", partial(idle, recipe, job), job.images, "bfloat16")
        for name, side in chosen:
            prepare = partial(behind, name, side, recipe, job)
            implementation = f"fastbyol {name}{'' if side is None else f', {side} px'}: load, views, step"
            yield Case("waiting", shape, implementation, prepare, job.images, "bfloat16")


def idle(recipe: Recipe, job: Job) -> Ready:
    """Prepare steps on one batch, over and over."""
    train = _train(recipe, job.device)
    (batch,) = loaders.load("native", job.reader(), job.rows()[:1], workers=job.threads, device=job.device)
    return Ready(partial(_run, train, cycle([batch]), job))


def behind(name: str, side: int | None, recipe: Recipe, job: Job) -> Ready:
    """Prepare steps behind a loader, which goes on decoding between the runs; loader memory has seen every sample."""
    train, reader = _train(recipe, job.device), at_side(job.reader(), side)
    try:
        batches = loaders.load(name, reader, job.stream(), workers=job.threads, device=job.device)
    except ConfigError as error:
        raise Absent(str(error)) from error
    if name == "memory":
        for _ in islice(batches, -(-len(reader) // job.batch_size)):
            pass
    return Ready(partial(_run, train, batches, job))


def _run(train: Train, batches: Iterator[Batch], job: Job) -> None:
    seen = 0
    for batch in islice(batches, job.batches):
        train(batch)
        seen += len(batch.indices)
    if seen != job.images:
        raise WrongResult(f"{seen} of {job.images} images came")


@lru_cache(maxsize=1)  # the rivals share one model: with its graph it takes tens of GiB
def _train(recipe: Recipe, device: str) -> Train:
    """Build model, optimiser and engine as training does; return a step from batch to loss."""
    is_gpu = device == "cuda"
    precision = "bfloat16" if is_gpu else "float32"
    model = BYOL(recipe.encoder, recipe.head, seed=0).to(device)
    lars = optim.build(model, model.target_of(), recipe.optim)
    engine: Any = step.engine("graph" if is_gpu else "eager", model, lars, precision=precision, lagged_target=False)

    def train(batch: Batch) -> object:
        drawn = views.draw(recipe.views, seed=0, epochs=batch.epochs, indices=batch.indices, sizes=batch.sizes.numpy())
        tensors = (queue_copy(tensor, device) for tensor in (batch.pixels, batch.offsets, batch.sizes, drawn.packed))
        pixels, offsets, sizes, packed = tensors
        dtype = torch.bfloat16 if is_gpu else torch.float32
        shown = views.apply(pixels, offsets, sizes, ViewParams(packed), crop_px=recipe.crop_px, dtype=dtype)
        return engine(shown, **RATES)

    return train
