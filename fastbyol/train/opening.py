"""A run's files and ranks, opened and checked before anything is computed: is the run new, begun or finished."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch
from fastbyol.config import Config
from fastbyol.errors import ConfigError
from fastbyol.evaluate import features
from fastbyol.evaluate.protocol import Files
from fastbyol.jpeg import require_pillow
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder, check_resumable, check_unused, is_longer, lock
from fastbyol.system.distributed import World, join_ranks
from fastbyol.system.shell import quoted
from fastbyol.train import method, micro_batches, start


class OpenRun(NamedTuple):
    """A run's files and ranks, open; state: "new", "started" or "finished"; config: with its micro-batches chosen.

    scored: the labelled images by which kNN scores, its bank and those of `val`; None without `val`.
    """

    config: Config
    folder: RunFolder
    train: Reader
    scored: Files | None
    world: World
    state: str


@contextmanager
def open_run(
    config: Config, folder: RunFolder, *, stopwatch: Stopwatch, resume: bool, overwrite: bool
) -> Iterator[OpenRun]:
    """Join the ranks, check data and folder, lock the folder, choose method and micro-batches, for the with-block."""
    require_pillow()
    with ExitStack() as stack:
        world, train = stack.enter_context(join_ranks(config.device)), stack.enter_context(Reader(config.data))
        scored = _scored(config, train, stack)
        check_data(config, train, scored, world)
        state = world.from_main(
            _folder_state(folder, config, resume=resume, overwrite=overwrite) if world.is_main else ""
        )
        if state == "finished":
            if world.is_main:
                print(f"{folder.path} has already finished", file=sys.stderr)
            yield OpenRun(config, folder, train, scored, world, state)
            return
        with lock(folder) if world.is_main else nullcontext():
            recorded = folder.read_config() if state == "started" and world.is_main else None
            if config.method == "auto":
                config = method.choose_or_adopt(config, recorded, train=train, world=world, stopwatch=stopwatch)
            init, digest = world.from_main(start.settle(config, recorded) if world.is_main else None)
            chosen = replace(config, init=init, init_digest=digest)
            chosen = micro_batches.choose_micro_batches(chosen, train=train, world=world, recorded=recorded)
            yield OpenRun(chosen, folder, train, scored, world, state)


def _scored(config: Config, train: Reader, stack: ExitStack) -> Files | None:
    if config.val is None:
        return None
    bank = train if config.labelled is None else stack.enter_context(Reader(config.labelled))
    return bank.labelled(), stack.enter_context(Reader(config.val)).labelled()


def check_data(config: Config, train: Reader, scored: Files | None, world: World) -> None:
    """Raise ConfigError if the files do not suit the run or a batch does not divide evenly."""
    batch, micro = config.recipe.batch_size, config.parts
    if batch > len(train):
        raise ConfigError(
            f"batch size is {batch}; {train.path} has only {len(train)} images; give a smaller --batch-size"
        )
    mine = micro_batches.images_of_rank(config, train, world)
    if mine % micro or mine < 2 * micro:
        raise ConfigError(
            f"{mine} images per rank do not divide into {micro} equal micro-batches of 2 images or more; "
            "give another --micro-batches or --batch-size"
        )
    if config.engine == "graph" and world.ranks > 1:
        raise ConfigError(
            f"engine graph with {world.ranks} ranks; a CUDA graph holds a step of one rank only; "
            "give --engine eager or compile"
        )
    if scored is not None:
        features.check_classes(*scored)


def _folder_state(folder: RunFolder, config: Config, *, resume: bool, overwrite: bool) -> str:
    """Return "new", "started" or "finished" for the folder's run; raise ConfigError if the folder cannot be used."""
    if not resume or not folder.config.exists():
        if resume:
            print(f"{folder.path} holds no run yet; starting one", file=sys.stderr)
        check_unused(folder, overwrite=overwrite)
        return "new"
    check_resumable(folder, method.adopt(config, folder.read_config()))
    if not folder.result.exists():
        return "started"
    if not is_longer(config, folder.read_config()):
        return "finished"
    if not checkpoint.exists(folder.checkpoints):
        raise ConfigError(
            f"{folder.path} has finished and has no checkpoint any more to go on from; start another run from its "
            f"weights: --init {quoted(folder.path)} --out DIR"
        )
    return "started"
