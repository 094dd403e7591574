"""Know how labelled images reach a network under evaluation: the whole centre once, or a crop and flip drawn anew."""

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
from fastbyol.loaders import Batch, load
from fastbyol.order import Rows, global_batch
from fastbyol.threads import NO_TUNING, ThreadTuner
from fastbyol.views import apply, center_view, draw

BATCH = 256  # images of a forward pass that keeps nothing for a backward one
CROP = ViewConfig(jitter=0, grayscale=0, blur=0, solarize=0)  # random crop and flip alone: paper, appendix C.1
Seen = Generator[tuple[Tensor, NDArray[np.int64]], None, None]


@dataclass(frozen=True)
class Lens:
    """Say how images are seen: squares of `px` pixels, made on `device` from what `workers` threads decode.

    A centre view shows the square of share `margin` of the short side. An image that does not decode raises BetonError
    (on_error "fail"), or the next of the file that does is seen in its place ("skip").
    """

    px: int
    margin: float
    workers: int = 2
    device: str = "cpu"
    on_error: str = "fail"
    threads: ThreadTuner = NO_TUNING

    def precision(self) -> AbstractContextManager[None]:
        """Give the context in which networks run: bfloat16 autocast on a GPU, float32 elsewhere."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda")


def centred(reader: Reader, indices: NDArray[np.int64], lens: Lens, *, batch: int = BATCH) -> Seen:
    """Yield the centre views of the images named, in that order: ([m, 3, px, px], the indices [n] of the first n).

    On a GPU each has m = `batch` images, and those beyond the n of the last are to be left out: every size of a batch
    costs a search for algorithms. On a CPU m = n.
    """
    parts = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    rows = [Rows(part, np.zeros_like(part)) for part in (parts if lens.device == "cpu" else padded(parts, batch))]
    with closing(_decoded(reader, rows, lens)) as batches:
        for part, decoded in zip(parts, batches, strict=True):
            views = center_view(*_on(lens.device, decoded), crop_px=lens.px, margin=lens.margin)
            yield views, decoded.indices[: len(part)]


def padded(parts: Sequence[NDArray[np.int64]], length: int) -> list[NDArray[np.int64]]:
    """Lengthen each part to `length` by repeating its last entry."""
    return [np.pad(part, (0, length - len(part)), mode="edge") for part in parts]


def cropped(reader: Reader, rows: Iterable[Rows], lens: Lens, *, seed: int) -> Seen:
    """Yield a crop of area 8 to 100 %, flipped half of the time, of each image: ([n, 3, px, px], their indices [n]).

    What is drawn is a function of (seed, epoch, image).
    """
    with closing(_decoded(reader, rows, lens)) as batches:
        for decoded in batches:
            params = draw(
                (CROP,), seed=seed, epochs=decoded.epochs, indices=decoded.indices, sizes=decoded.sizes.numpy()
            ).to(lens.device)
            yield apply(*_on(lens.device, decoded), params, crop_px=lens.px), decoded.indices


def _decoded(reader: Reader, rows: Iterable[Rows], lens: Lens) -> Generator[Batch, None, None]:
    return load("native", reader, rows, workers=lens.workers, on_error=lens.on_error, device=lens.device)


def _on(device: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.pixels, batch.offsets.to(device), batch.sizes.to(device)


def shuffled(indices: NDArray[np.int64], *, batch: int, steps: int, seed: int) -> Iterator[Rows]:
    """Yield `steps` batches of the endless stream of shuffled epochs over the images named."""
    for k in range(steps):
        rows = global_batch(k, batch_size=batch, count=len(indices), seed=seed)
        yield Rows(indices[rows.indices], rows.epochs)
