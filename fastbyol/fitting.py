"""Micro-batches of a run: settled by the GPU's memory before anything is spent, raised where it runs out."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import torch

from fastbyol import memory
from fastbyol.beton import Reader
from fastbyol.config import Config, ConfigError
from fastbyol.distributed import World
from fastbyol.order import global_batch, share

QUEUED_BATCHES = 2.0  # decoded images on the GPU: those of this step and those copied ahead


def images_of_rank(config: Config, train: Reader, world: World) -> int:
    """Count the images of a batch that fall to this rank."""
    first = global_batch(0, batch_size=config.recipe.batch_size, count=len(train), seed=config.seed)
    return len(share(first, rank=world.rank, ranks=world.ranks).indices)


def can_split(config: Config) -> bool:
    """Tell whether a step may be computed in micro-batches."""
    return not config.recipe.lagged_target and config.crop == "kernels"


def settled(config: Config, *, train: Reader, world: World, recorded: Config | None) -> Config:
    """Settle the micro-batches of a run: as asked for, else as its memory allows, and say in one line what was chosen.

    recorded: the configuration of a run that is taken up; it is not computed in fewer parts than before. Rank 0's GPU
    decides for all. Raises ConfigError where a step fits in no way.
    """
    if config.device == "cpu":
        return replace(config, micro_batches=config.parts)
    found = world.from_main(_found(config, train, world, recorded) if world.is_main else None)
    if world.is_main:
        said = found or "a step is predicted not to fit as asked for; trying it all the same"
        print(f"memory: {said}", file=sys.stderr)
    if found is None:
        return replace(config, recomputes=True)
    return replace(config, micro_batches=found.parts, recomputes=found.recomputes)


def _found(config: Config, train: Reader, world: World, recorded: Config | None) -> memory.Fit | None:
    """Predict; None where the number of micro-batches was asked for and is predicted not to fit."""
    images = images_of_rank(config, train, world)
    area = 3 * int((train.heights * train.widths).mean())
    pixels = area * (len(train) if config.loader == "memory" else QUEUED_BATCHES * images)
    try:
        return memory.fit(
            config.recipe,
            images=images,
            precision=config.precision,
            usable_bytes=memory.usable_bytes(memory.free_bytes()) - int(pixels),
            least_parts=1 if recorded is None else recorded.parts,
            only_parts=config.micro_batches,
            can_split=can_split(config),
        )
    except ConfigError:
        if config.micro_batches is not None:
            return None
        raise


def split_further(asked: Config, chosen: Config, *, images: int, ranks: int, failure: str) -> Config:
    """Change how a step is computed after the GPU's memory ran out: recompute first, which changes no bit, then split.

    asked: the configuration as the user gave it; images: of a batch, on this rank. Raises ConfigError where the user
    chose, where nothing is left to try, and on several ranks, which have to start anew together.
    """
    gc.collect()
    torch.cuda.empty_cache()
    more = next(memory.divisors(images, above=chosen.parts), None)
    advice = "a smaller --batch-size" if more is None else f"--micro-batches {more}, or a smaller --batch-size"
    if asked.micro_batches is not None or more is None or ranks > 1 or not can_split(asked):
        raise ConfigError(
            f"the GPU's memory ran out in a step of {chosen.parts} x {images // chosen.parts} images ({failure}); "
            f"give {advice}; what was saved is kept"
        )
    if chosen.device == "cuda" and not chosen.recomputes:
        changed, what = replace(chosen, recomputes=True), "some activations are computed again in the backward"
    else:
        changed = replace(chosen, micro_batches=more, recomputes=False)
        what = f"a step is {more} micro-batches, each of {images // more} images a population of batch norm"
    print(f"warning: the GPU's memory ran out ({failure}); from here on {what}", file=sys.stderr)
    return changed
