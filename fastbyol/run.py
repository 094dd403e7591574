"""Know one run as a whole: from a configuration, or a checkpoint, to a scored and exported encoder with its report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from fastbyol import apex, calibrate, checkpoint, optim, schedule, step
from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch, format_duration
from fastbyol.byol import BYOL
from fastbyol.closing import Closing
from fastbyol.config import Config, ConfigError
from fastbyol.distributed import World, joined
from fastbyol.evaluate import features
from fastbyol.loop import Loop
from fastbyol.order import global_batch, share
from fastbyol.plan import ClockPlan, Plan, Reserve, StepPlan
from fastbyol.runfolder import RunFolder, begin, check_resumable, check_unused
from fastbyol.schedule import Schedule
from fastbyol.signals import StopSignal
from fastbyol.telemetry import Intervals, read_metrics

OPTIMIZERS: dict[str, Callable[..., step.Optimizer]] = {"lars": optim.build, "apex-larc": apex.LARC}
WARMUP_MAX = 0.25  # of a run by the clock; the paper's shortest preset warms up for 10 of 40 epochs
RECALIBRATION = 0.5  # of a step: loading, views and one forward of what a step does


def run(
    config: Config,
    folder: RunFolder,
    *,
    stopwatch: Stopwatch,
    stop: StopSignal,
    resume: bool = False,
    overwrite: bool = False,
) -> bool:
    """Carry out a run in its folder; True when it finished, False when a signal stopped it and it can be resumed.

    Under torchrun every rank calls it. With `resume` a folder without a run begins one. Raises ConfigError, BetonError
    or CheckpointError for input that cannot be used, before anything is overwritten; OSError where the disk refuses;
    watchdog.Diverged; distributed.RankLost.
    """
    val_reader = nullcontext() if config.val is None else Reader(config.val)
    with joined(config.device) as world, Reader(config.data) as train, val_reader as val:
        check_data(config, train, val, world)
        state = world.from_main(_state_of(folder, config, resume=resume, overwrite=overwrite) if world.is_main else "")
        if state == "finished":
            if world.is_main:
                print(f"{folder.path} has already finished", file=sys.stderr)
            return True
        this = Run(config, folder, train=train, val=val, world=world, stopwatch=stopwatch, stop=stop)
        if state == "begun":
            this.take_up()
        has_finished = this.go(is_new=state == "new")
        world.from_main(None)  # rank 0 may still be at its closing work
        return has_finished


def check_data(config: Config, train: Reader, val: Reader | None, world: World) -> None:
    """Raise ConfigError where the files do not serve the run, or its batches do not divide among the ranks."""
    batch, micro = config.recipe.batch_size, config.micro_batches
    if batch > len(train):
        raise ConfigError(
            f"batch size {batch} exceeds the {len(train)} images of {train.path}; give a smaller --batch-size"
        )
    first = global_batch(0, batch_size=batch, count=len(train), seed=config.seed)
    mine = len(share(first, rank=world.rank, ranks=world.ranks).indices)
    if mine % micro or mine < 2 * micro:
        raise ConfigError(
            f"{mine} images a rank do not make {micro} equal micro-batches of 2 images or more; "
            "give another --micro-batches or --batch-size"
        )
    if val is not None:
        features.check_classes(train, val)


def _state_of(folder: RunFolder, config: Config, *, resume: bool, overwrite: bool) -> str:
    """Say whether the folder's run is "new", "begun" or "finished"; raise ConfigError where it may not be used."""
    if not resume or not folder.config.exists():
        if resume:
            print(f"{folder.path} holds no run yet: one begins", file=sys.stderr)
        check_unused(folder, overwrite=overwrite)
        return "new"
    check_resumable(folder, config)
    return "finished" if folder.result.exists() else "begun"


class Run:
    """Hold what one run works with, and take it from its position to its result."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        *,
        train: Reader,
        val: Reader | None,
        world: World,
        stopwatch: Stopwatch,
        stop: StopSignal,
    ) -> None:
        self.config, self.folder, self.train, self.world, self.stopwatch = config, folder, train, world, stopwatch
        recipe = config.recipe
        torch.backends.cudnn.benchmark = True  # shapes repeat for hours: cuDNN may time its algorithms
        self.model = BYOL(
            recipe.encoder,
            recipe.head,
            seed=config.seed,
            target_statistics=recipe.target_statistics,
            objective=recipe.objective,
        ).to(config.device)
        followed = {} if recipe.lagged_target else self.model.target_of()
        optimizer = OPTIMIZERS[config.optimizer](self.model, followed, recipe.optim)
        engine = step.engine(
            config.engine, self.model, optimizer, precision=config.precision, lagged_target=recipe.lagged_target
        )
        if world.group is not None:
            engine.share(world.group)
        self.loop = Loop(
            config, reader=train, engine=engine, folder=folder, world=world, stopwatch=stopwatch, stop=stop
        )
        self.closing = Closing(config, folder, train=train, val=val, loop=self.loop)
        self.epochs: float | None = None  # that the schedules were made for, by an earlier process

    def take_up(self) -> None:
        """Continue from the newest checkpoint that reads; from the start if the run was stopped before its first.

        The clock takes up what earlier processes are known to have used: up to that checkpoint or the last row.
        """
        used_s = [row["elapsed_s"] for row in read_metrics(self.folder.metrics)[-1:]]
        if checkpoint.exists(self.folder.checkpoints):
            state, damaged = checkpoint.load_newest(self.folder.checkpoints)
            self.loop.restore(state)
            for line in damaged:
                self.loop.warn(line)
            self.epochs = state["epochs"]
            used_s.append(state["elapsed_s"])
        self.stopwatch.add(max(used_s, default=0.0))

    def go(self, *, is_new: bool) -> bool:
        """Plan, train and close; True when finished, False when a signal came first."""
        deadline_s = self._deadline_s()
        if self.loop.position.progress == 1.0:  # only the closing work was interrupted: it takes what it takes
            deadline_s = None
        else:
            plan, made = self.plan(deadline_s)
            if is_new and self.world.is_main:
                begin(self.folder, self.config)
            if not self.fit(plan, made):
                return False
        if self.world.is_main:
            self.closing.carry_out(deadline_s=deadline_s)
        return True

    def _deadline_s(self) -> float | None:
        """Give the end of the process in seconds of the run; None for a run that counts epochs."""
        if self.config.deadline is not None:
            return self.stopwatch.at(self.config.deadline)
        return self.config.budget_s

    def plan(self, deadline_s: float | None) -> tuple[Plan, Schedule]:
        """Rehearse the closing work, measure a step, and make plan and schedules, alike on every rank."""
        began_s = self.stopwatch.elapsed_s()
        if self.world.is_main:
            self.closing.rehearse()
        rehearsed_s = self.stopwatch.elapsed_s()
        recipe, config = self.config.recipe, self.config
        if deadline_s is None:
            assert config.epochs is not None
            made = schedule.planned(recipe, epochs=config.epochs)
            return StepPlan(max(math.ceil(config.epochs * len(self.train) / recipe.batch_size), 1)), made
        plan = ClockPlan(deadline_s, Reserve(dict(self.closing.seconds)))
        if self.world.is_main:
            self._require_time(plan)
        step_s = self._step_s(plan)
        plan.reserve.rehearsed_step = (recipe.crop_px, step_s)
        plan.reserve.best[recipe.crop_px] = step_s
        plan.reserve.parts["recalibrate"] = RECALIBRATION * step_s * recipe.recalibrate
        now_s = self.stopwatch.elapsed_s()
        steps = (plan.end_s - now_s) / (step_s * schedule.relative_cost(recipe))
        fitting = self.loop.position.step + max(steps, 1.0)
        epochs = self.world.from_main(self.epochs or fitting * recipe.batch_size / len(self.train))
        made = schedule.planned(recipe, epochs=epochs, warmup_max=WARMUP_MAX)
        if self.world.is_main:
            self._require_time(plan)
            self.loop.notes["plan"] = {
                "budget_s": deadline_s,
                "startup_s": began_s,
                "rehearsal_s": rehearsed_s - began_s,
                "calibration_s": now_s - rehearsed_s,
                "epochs_that_fit": fitting * recipe.batch_size / len(self.train),
                "step_s": step_s,
                "reserve_s": plan.reserve.seconds(),
                "closing_s": dict(plan.reserve.parts),
                "base_lr": made.base_lr,
                "tau_base": made.tau_base,
            }
            self._tell(made)
        return plan, made

    def _step_s(self, plan: ClockPlan) -> float:
        """Measure a step at full crop size, on every rank."""
        loop, left_s = self.loop, plan.end_s - self.stopwatch.elapsed_s()
        intervals, made = Intervals(), schedule.planned(self.config.recipe, epochs=self.config.recipe.epochs)
        batches = loop.batches()

        def timed_step() -> float:
            began_s = time.monotonic()
            loop.step(batches, made, intervals, progress=1.0)
            if self.config.device == "cuda":
                torch.cuda.synchronize()
            return time.monotonic() - began_s

        try:
            return calibrate.measure(
                timed_step,
                loop.live,
                warm_up=step.WARM_UP if self.config.engine == "graph" else 0,
                left_s=left_s,
                agree=self.world.from_main,
            )
        finally:
            batches.close()

    def _require_time(self, plan: ClockPlan) -> None:
        elapsed_s = self.stopwatch.elapsed_s()
        if plan.end_s <= elapsed_s:
            raise ConfigError(
                f"a budget of {format_duration(plan.deadline_s)} leaves no time to train: {elapsed_s:.0f} s are used "
                f"and {plan.reserve.seconds():.0f} s are needed to evaluate and save; give a longer --budget"
            )

    def _tell(self, made: Schedule) -> None:
        told = self.loop.notes["plan"]
        print(
            f"fits {told['epochs_that_fit']:.3g} epochs at {1000 * told['step_s']:.3g} ms a step; "
            f"base lr {made.base_lr:.3g}, tau {made.tau_base:.4g}, warm-up {made.warmup:.1%}; "
            f"{told['reserve_s']:.1f} s kept to evaluate and save",
            file=sys.stderr,
        )

    def fit(self, plan: Plan, made: Schedule) -> bool:
        """Train to the end of the plan: True; or to a signal: False. A run that ends early gets its report, too."""
        finished = False
        try:
            finished = self.loop.run(plan, made)
        finally:
            if not finished and self.world.is_main:
                self.closing.report(None)
        return finished
