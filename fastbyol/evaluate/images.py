"""Batches of images for evaluation: centre views, or random crops and flips."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.config import ViewConfig
from fastbyol.loaders import load
from fastbyol.loaders.batch import Batch
from fastbyol.order import Rows, global_batch
from fastbyol.system.threads import NO_TUNING, ThreadTuner
from fastbyol.views import apply, center_view, draw

BATCH_GPU, BATCH_CPU = 256, 64  # images in a forward pass without a backward pass; a CPU's caches hold few
CROP = ViewConfig(jitter=0, grayscale=0, blur=0, solarize=0)  # random crop and flip only: paper, appendix C.1
ViewBatches = Generator[tuple[Tensor, NDArray[np.int64]], None, None]


@dataclass(frozen=True)
class InputSettings:
    """How images are decoded and resized: squares of `px` pixels on `device`, decoded by `workers` threads.

    A centre view shows the centre square whose side is `margin` times the short side. If an image does not decode,
    on_error "fail" raises BetonError and "skip" uses the next image of the file that decodes.
    """

    px: int
    margin: float
    workers: int = 2
    device: str = "cpu"
    on_error: str = "fail"
    threads: ThreadTuner = NO_TUNING

    @property
    def batch(self) -> int:
        """The number of images in a forward pass."""
        return BATCH_CPU if self.device == "cpu" else BATCH_GPU

    def precision(self) -> AbstractContextManager[None]:
        """Return the context in which networks run: bfloat16 autocast on a GPU, float32 elsewhere."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda")


def center_views(reader: Reader, indices: NDArray[np.int64], inputs: InputSettings) -> ViewBatches:
    """Yield (centre views [m, 3, px, px], indices [n] of the first n of them), in the order of `indices`.

    On a CPU m = n. On a GPU m is always `inputs.batch`, because every new batch size costs a search for algorithms; the
    caller drops the views beyond n in the last batch.
    """
    batch = inputs.batch
    parts = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    rows = [
        Rows(part, np.zeros_like(part)) for part in (parts if inputs.device == "cpu" else pad_to_length(parts, batch))
    ]
    with closing(_decode(reader, rows, inputs)) as batches:
        for part, decoded in zip(parts, batches, strict=True):
            views = center_view(*_to_device(inputs.device, decoded), crop_px=inputs.px, margin=inputs.margin)
            yield views, decoded.indices[: len(part)]


def pad_to_length(parts: Sequence[NDArray[np.int64]], length: int) -> list[NDArray[np.int64]]:
    """Pad each part to `length` by repeating its last entry."""
    return [np.pad(part, (0, length - len(part)), mode="edge") for part in parts]


def random_crops(reader: Reader, rows: Iterable[Rows], inputs: InputSettings, *, seed: int) -> ViewBatches:
    """Yield (random crops [n, 3, px, px], indices [n]): area 8 to 100 %, flipped half of the time.

    The draws are a function of (seed, epoch, image).
    """
    with closing(_decode(reader, rows, inputs)) as batches:
        for decoded in batches:
            params = draw(
                (CROP,), seed=seed, epochs=decoded.epochs, indices=decoded.indices, sizes=decoded.sizes.numpy()
            ).to(inputs.device)
            yield apply(*_to_device(inputs.device, decoded), params, crop_px=inputs.px), decoded.indices


def _decode(reader: Reader, rows: Iterable[Rows], inputs: InputSettings) -> Generator[Batch, None, None]:
    return load("native", reader, rows, workers=inputs.workers, on_error=inputs.on_error, device=inputs.device)


def _to_device(device: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.pixels, batch.offsets.to(device), batch.sizes.to(device)


def shuffled_batches(indices: NDArray[np.int64], *, batch: int, steps: int, seed: int) -> Iterator[Rows]:
    """Yield the first `steps` batches of an endless stream of shuffled epochs over `indices`."""
    for k in range(steps):
        rows = global_batch(k, batch_size=batch, count=len(indices), seed=seed)
        yield Rows(indices[rows.indices], rows.epochs)
