"""Number of micro-batches of a run: chosen by the GPU's memory at the start, raised when it runs out."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import torch

from fastbyol.beton import Reader
from fastbyol.config import Config
from fastbyol.errors import ConfigError
from fastbyol.loaders import nvjpeg
from fastbyol.loaders.memory import GPU_SHARE
from fastbyol.loaders.resized import at_side
from fastbyol.order import global_batch, rows_of_rank
from fastbyol.system.distributed import World
from fastbyol.train import memory

QUEUED_BATCHES = 2.0  # batches of decoded images on the GPU: this step's and the one copied ahead


def images_of_rank(config: Config, train: Reader, world: World) -> int:
    """Return the number of images of a global batch on this rank."""
    first = global_batch(0, batch_size=config.recipe.batch_size, count=len(train), seed=config.seed)
    return len(rows_of_rank(first, rank=world.rank, ranks=world.ranks).indices)


def can_split(config: Config) -> bool:
    """Tell whether a step can be computed in micro-batches."""
    return not config.recipe.lagged_target and config.crop == "kernels"


def choose_micro_batches(config: Config, *, train: Reader, world: World, recorded: Config | None) -> Config:
    """Set a run's micro-batches as the user requested or else as the memory allows, and print one line about it.

    recorded: the configuration of a run to resume, which never gets fewer parts than before. Rank 0's GPU decides for
    all ranks. Raises ConfigError if a step cannot be made to fit.
    """
    if config.device == "cpu":
        before = world.from_main(1 if recorded is None else recorded.parts)
        return replace(config, micro_batches=before if config.micro_batches is None else config.micro_batches)
    fit, message = world.from_main(_predict_fit(config, train, world, recorded) if world.is_main else None)
    if world.is_main:
        print(f"memory: {message}", file=sys.stderr)
    if fit is None:
        return replace(config, recomputes=can_recompute(config))
    return replace(config, micro_batches=fit.parts, recomputes=fit.recomputes)


def can_recompute(config: Config) -> bool:
    """Tell whether activations can be recomputed; torch.compile decides for itself what it keeps."""
    return config.device == "cuda" and config.engine != "compile"


def _predict_fit(config: Config, train: Reader, world: World, recorded: Config | None) -> tuple[memory.Fit | None, str]:
    """Predict how a step fits, with a message; None if the user's number of micro-batches is predicted not to fit."""
    images, free = images_of_rank(config, train, world), memory.free_bytes()
    try:
        fit = memory.fit(
            config.recipe,
            images=images,
            precision=config.precision,
            usable_bytes=max(memory.usable_bytes(free) - pixel_bytes(config, train, images=images, free=free), 0),
            least_parts=1 if recorded is None else recorded.parts,
            only_parts=config.micro_batches,
            can_split=can_split(config),
            can_recompute=can_recompute(config),
            ranks=world.ranks,
        )
    except ConfigError as error:
        if config.micro_batches is None:
            raise
        return None, f"{error}; trying it anyway, with some activations recomputed in the backward"
    return fit, str(fit)


def pixel_bytes(config: Config, train: Reader, *, images: int, free: int) -> int:
    """Estimate the bytes of decoded images on a GPU of so many free bytes: of some batches, or of the whole file."""
    kept = at_side(train, config.memory_side)
    image_bytes = 3 * int((kept.heights * kept.widths).mean())
    queued, dataset_bytes = int(QUEUED_BATCHES * images * image_bytes), len(train) * image_bytes
    if config.loader == "memory" and dataset_bytes <= GPU_SHARE * free:
        return dataset_bytes
    if config.loader == "nvjpeg":
        return queued + nvjpeg.batches_on_gpu(prefetch=config.prefetch) * images * image_bytes
    return queued


def split_further(requested: Config, chosen: Config, *, images: int, ranks: int, failure: str) -> tuple[Config, str]:
    """Change how a step is computed after the GPU ran out of memory: first recompute (the same result), then split.

    requested: the configuration as the user gave it; images: of a batch, on this rank; failure: the error's message.
    Returns the new configuration and a line about the change. Raises ConfigError if the user chose the micro-batches,
    if nothing is left to try, and on several ranks, which must restart together.
    """
    gc.collect()
    torch.cuda.empty_cache()
    if ranks == 1 and can_recompute(chosen) and not chosen.recomputes:
        line = f"the GPU's memory ran out ({failure}); from now on some activations are recomputed in the backward"
        return replace(chosen, recomputes=True), line
    more = next(memory.micro_batch_counts(images, above=chosen.parts), None)
    if requested.micro_batches is not None or more is None or ranks > 1 or not can_split(requested):
        splits = more is not None and can_split(requested)
        advice = f"--micro-batches {more}, or a smaller --batch-size" if splits else "a smaller --batch-size"
        raise ConfigError(
            f"the GPU's memory ran out in a step of {chosen.parts} x {images // chosen.parts} images ({failure}); "
            f"give {advice}; the checkpoints written so far are kept"
        )
    each = images // more
    line = (
        f"the GPU's memory ran out ({failure}); from now on a step is {more} micro-batches of {each} images, each a "
        "population of batch norm"
    )
    return replace(chosen, micro_batches=more, recomputes=False), line
