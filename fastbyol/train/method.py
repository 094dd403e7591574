"""Choice of the training method by the epochs that a run's budget fits, before its model is built."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import torch

from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch
from fastbyol.config import Config, Recipe
from fastbyol.model.byol import BYOL
from fastbyol.model.parts import build_optimizer
from fastbyol.recipes.methods import choices, choose, variants
from fastbyol.recipes.overrides import apply_change
from fastbyol.system import threads
from fastbyol.system.distributed import World
from fastbyol.system.threads import ThreadTuner
from fastbyol.train import memory, step
from fastbyol.train.gradients import check_gradients

WARM_UP, TIMED = step.WARM_UP + 1, 3  # steps; a graph is captured after its engine's warm-up
TRAINING_SHARE = 0.85  # of the time left goes into steps, the rest into planning, views and closing work
MEASURED_IMAGES = 64  # of a step on a CPU, where a step takes about as long as its images
MEASURED_SHARE = 0.05  # of the time left: on a CPU no step to measure begins after it


def adopt(config: Config, recorded: Config) -> Config:
    """Return the configuration with the recipe that auto chose for the run that it is to resume."""
    if config.method == recorded.method == "auto" and recorded.recipe in variants(config.recipe):
        return replace(config, recipe=recorded.recipe)
    return config


def choose_or_adopt(
    config: Config, recorded: Config | None, *, train: Reader, world: World, stopwatch: Stopwatch
) -> Config:
    """Return the configuration with the recipe that --method auto chooses, or has chosen for the run to resume.

    Rank 0 chooses for all ranks and says why in a line.
    """
    chosen, line = world.from_main(_choice(config, recorded, train, world, stopwatch) if world.is_main else None)
    if world.is_main:
        print(f"method: {line}", file=sys.stderr)
    config = replace(config, recipe=chosen)
    config.check_warmup()
    return config


def _choice(
    config: Config, recorded: Config | None, train: Reader, world: World, stopwatch: Stopwatch
) -> tuple[Recipe, str]:
    """Return the recipe and a line about it."""
    recipe, epochs = config.recipe, config.epochs
    if recorded is not None:
        return recorded.recipe, f"as chosen, {recorded.recipe.name}"
    if not choices(recipe):
        return recipe, f"no other was measured for {recipe.name}, which stays"
    if epochs is None:
        end_s = config.end_s(stopwatch.elapsed_at)
        assert end_s is not None
        left_s = TRAINING_SHARE * max(end_s - stopwatch.elapsed_s(), 0.0)
        print(f"method: measuring a step of {recipe.name}", file=sys.stderr)
        tuner = threads.make_tuner(config.threads, config.device, processes=world.local_ranks)
        images = recipe.batch_size // world.ranks
        measured = min(images, MEASURED_IMAGES) if config.device == "cpu" else images
        each_s = step_s(config, tuner, images=measured, left_s=left_s) * images / measured
        epochs = max(left_s / each_s, 1.0) * recipe.batch_size / len(train)
    length = f"about {epochs:.2g} epochs of {len(train)} images"
    choice = choose(recipe, seen=epochs * len(train))
    if choice is None:
        return recipe, f"{recipe.name}'s own; no other was measured in runs as long as {length} (docs/quality.md)"
    changed = apply_change(recipe, choice.change)
    if changed.batch_size > len(train):
        reason = (
            f"{choice.name}, which has won, takes batches of {changed.batch_size} images, and there are {len(train)}"
        )
        return recipe, f"{recipe.name}'s own: {reason}"
    evidence = choice.nearest(epochs * len(train))
    return changed, (
        f"{choice.name}, for {length} by {recipe.name}: kNN {evidence.chosen:.1f} against {evidence.own:.1f} by its "
        f"own method at {evidence.epochs:.2g} epochs of {choice.images} (docs/quality.md); the same as recipe "
        f"{recipe.name}+{choice.change}"
    )


def step_s(config: Config, tuner: ThreadTuner, *, images: int, left_s: float) -> float:
    """Measure the seconds of a step on this many random images, on a model of its own, in parts where memory ends.

    left_s: seconds of the run, 0 or more. On a CPU, whose first steps are like all others, a share of them ends the
    measurement, after one step or more.
    """
    recipe = config.recipe
    try:
        views = len(recipe.global_views)
        model = BYOL(recipe.encoder, recipe.head, seed=config.seed, views=views, objective=recipe.objective)
        model.to(config.device)
        optimizer = build_optimizer(recipe.optim.optimizer, model, model.target_of(), recipe.optim)
        engine = step.engine(config.engine, model, optimizer, precision=config.precision)
        check_gradients(engine, recipe, ranks=1)
        batch = step.random_views(recipe, images=images, device=config.device)
        taken: list[float] = []
        while len(taken) < WARM_UP + TIMED:
            if config.device == "cpu" and taken and sum(taken) > MEASURED_SHARE * left_s:
                break
            began_s = time.monotonic()
            with tuner.unit("step"):
                engine(*batch, lr=0.0, tau=1.0)
            if config.device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.monotonic() - began_s)
        return statistics.median(taken[-TIMED:])
    except RuntimeError as error:
        if not memory.is_out_of_memory(error) or images < 4:
            raise
    return 2 * step_s(config, tuner, images=images // 2, left_s=left_s)
