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
from fastbyol.loaders.memory import GPU_SHARE
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
        before = world.from_main(1 if recorded is None else recorded.parts)
        return replace(config, micro_batches=before if config.micro_batches is None else config.micro_batches)
    found, said = world.from_main(_found(config, train, world, recorded) if world.is_main else None)
    if world.is_main:
        print(f"memory: {said}", file=sys.stderr)
    if found is None:
        return replace(config, recomputes=can_recompute(config))
    return replace(config, micro_batches=found.parts, recomputes=found.recomputes)


def can_recompute(config: Config) -> bool:
    """Tell whether activations can be computed again: torch.compile decides for itself what it keeps."""
    return config.device == "cuda" and config.engine != "compile"


def _found(config: Config, train: Reader, world: World, recorded: Config | None) -> tuple[memory.Fit | None, str]:
    """Predict, and say so; None where the number of micro-batches was asked for and is predicted not to fit."""
    images, free = images_of_rank(config, train, world), memory.free_bytes()
    area = 3 * int((train.heights * train.widths).mean())
    pixels, whole_set = int(QUEUED_BATCHES * images * area), len(train) * area
    if config.loader == "memory" and whole_set <= GPU_SHARE * free:
        pixels = whole_set
    try:
        found = memory.fit(
            config.recipe,
            images=images,
            precision=config.precision,
            usable_bytes=max(memory.usable_bytes(free) - pixels, 0),
            least_parts=1 if recorded is None else recorded.parts,
            only_parts=config.micro_batches,
            can_split=can_split(config),
            can_recompute=can_recompute(config),
            ranks=world.ranks,
        )
    except ConfigError as error:
        if config.micro_batches is None:
            raise
        return None, f"{error}; trying it all the same, with some activations computed again in the backward"
    return found, str(found)


def split_further(asked: Config, chosen: Config, *, images: int, ranks: int, failure: str) -> tuple[Config, str]:
    """Change how a step is computed after the GPU's memory ran out: recompute first, which changes no bit, then split.

    asked: the configuration as the user gave it; images: of a batch, on this rank. Returns the configuration and a line
    that says what is changed. Raises ConfigError where the user chose, where nothing is left to try, and on several
    ranks, which have to start anew together.
    """
    gc.collect()
    torch.cuda.empty_cache()
    if ranks == 1 and can_recompute(chosen) and not chosen.recomputes:
        line = f"the GPU's memory ran out ({failure}); from here on some activations are computed again in the backward"
        return replace(chosen, recomputes=True), line
    more = next(memory.divisors(images, above=chosen.parts), None)
    if asked.micro_batches is not None or more is None or ranks > 1 or not can_split(asked):
        splits = more is not None and can_split(asked)
        advice = f"--micro-batches {more}, or a smaller --batch-size" if splits else "a smaller --batch-size"
        raise ConfigError(
            f"the GPU's memory ran out in a step of {chosen.parts} x {images // chosen.parts} images ({failure}); "
            f"give {advice}; what was saved is kept"
        )
    each = images // more
    line = (
        f"the GPU's memory ran out ({failure}); from here on a step is {more} micro-batches, each of {each} images a "
        "population of batch norm"
    )
    return replace(chosen, micro_batches=more, recomputes=False), line
