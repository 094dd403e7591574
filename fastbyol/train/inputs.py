"""Input pipeline from the file to views: a rank's batches, decoded ahead of the step, and their views."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import cycle, islice

import torch
from torch import Tensor

from fastbyol import views
from fastbyol.beton import Reader
from fastbyol.config import Config
from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders import crop_by_dali, load
from fastbyol.loaders.batch import Batch
from fastbyol.loaders.resized import at_side
from fastbyol.monitor.metrics import Intervals
from fastbyol.order import stream
from fastbyol.system.device import queue_copy
from fastbyol.system.distributed import World


class Pipeline:
    """The input pipeline of one run on one rank; views have dtype `precision`."""

    def __init__(self, config: Config, reader: Reader, world: World, *, precision: torch.dtype) -> None:
        self.config, self.world, self.precision = config, world, precision
        self.reader = at_side(reader, config.memory_side)  # one for all loads: loader memory keeps its images

    def batches(self, start: int, *, repeated: int | None = None) -> Generator[Batch, None, None]:
        """Load this rank's rows of global batches start, start + 1, ... without end; repeated: so many, in turn."""
        config, world = self.config, self.world
        rows = stream(
            start,
            batch_size=config.recipe.batch_size,
            count=len(self.reader),
            seed=config.seed,
            rank=world.rank,
            ranks=world.ranks,
        )
        if repeated is not None:
            rows = cycle(islice(rows, repeated))
        loaded = load(
            config.loader,
            self.reader,
            rows,
            workers=config.workers,
            prefetch=config.prefetch,
            on_error=config.on_error,
            device=config.device,
            processes=world.local_ranks,
        )
        if config.crop == "kernels":
            return loaded
        return crop_by_dali(
            loaded, self._draw, crop_px=config.recipe.crop_px, workers=config.workers, device=config.device
        )

    def _draw(self, batch: Batch) -> ViewParams:
        """Draw the views of a batch's samples, from the sizes of the uncropped images."""
        config, sizes = self.config, batch.sizes.numpy()[: len(batch.indices)]
        return views.draw(
            config.recipe.drawn_views, seed=config.seed, epochs=batch.epochs, indices=batch.indices, sizes=sizes
        )

    def views(self, batch: Batch, crop_px: int, intervals: Intervals) -> Iterator[tuple[Tensor, ...]]:
        """Yield the views of a batch, one micro-batch at a time.

        The global ones [V*B/n, 3, crop_px, crop_px], then the local ones [L*B/n, 3, h, h] if the recipe has any.
        """
        device, drawn = self.config.device, self._draw(batch)
        groups = self.config.recipe.sizes_of_views(crop_px)
        if self.config.crop == "dali":  # the batch holds all views as images
            drawn, groups = views.params_of_crops(drawn, crop_px=crop_px), [(1, crop_px)]
        pixels, offsets, sizes, packed = (
            queue_copy(tensor, device) for tensor in (batch.pixels, batch.offsets, batch.sizes, drawn.packed)
        )
        count = len(batch.offsets) // self.config.parts
        for number in range(self.config.parts):
            intervals.lap("step_s")  # of the previous micro-batch
            part = slice(number * count, (number + 1) * count)
            place = (pixels, offsets[part], sizes[part])
            kinds = torch.split(packed[:, part], [views_of_size for views_of_size, _ in groups])
            made = tuple(
                views.apply(*place, ViewParams(kind.contiguous()), crop_px=px, dtype=self.precision)
                for kind, (_, px) in zip(kinds, groups, strict=True)
            )
            intervals.lap("views_s")
            yield made
