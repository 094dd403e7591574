"""Know one run as a whole: from a configuration, or a checkpoint, to a scored and exported encoder with its report."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from fastbyol import apex, atomic, calibrate, checkpoint, fitting, memory, optim, schedule, step
from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch, format_duration
from fastbyol.byol import BYOL
from fastbyol.closing import Closing
from fastbyol.config import Config, ConfigError, to_json
from fastbyol.device import STEPS_AHEAD, make_deterministic
from fastbyol.distributed import World, join_ranks
from fastbyol.evaluate import features
from fastbyol.jpeg import require_pillow
from fastbyol.loop import Loop
from fastbyol.plan import ClockPlan, Plan, Reserve, StepPlan
from fastbyol.runfolder import RunFolder, check_resumable, check_unused, initialize, lock
from fastbyol.schedule import Schedule
from fastbyol.signals import StopSignal
from fastbyol.telemetry import Intervals, read_metrics
from fastbyol.watchdog import Diverged

OPTIMIZERS: dict[str, Callable[..., step.Optimizer]] = {"lars": optim.build, "apex-larc": apex.LARC}
WARMUP_MAX = 0.25  # of a run by the clock; the paper's shortest preset warms up for 10 of 40 epochs
SCORES_MAX = 0.5  # of the time to train
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

    `stopwatch` counts the seconds of the budget; `stop` hears the signals. Under torchrun every rank calls it. With
    `resume` a folder without a run begins one. Raises ConfigError, BetonError or CheckpointError for input that cannot
    be used, before anything is overwritten; OSError where the disk refuses; watchdog.Diverged; distributed.RankLost.
    """
    require_pillow()
    val_reader = nullcontext() if config.val is None else Reader(config.val)
    with join_ranks(config.device) as world, Reader(config.data) as train, val_reader as val:
        check_data(config, train, val, world)
        state = world.from_main(_state_of(folder, config, resume=resume, overwrite=overwrite) if world.is_main else "")
        if state == "finished":
            if world.is_main:
                print(f"{folder.path} has already finished", file=sys.stderr)
            return True
        with lock(folder) if world.is_main else nullcontext():
            begun = folder.read_config() if state == "begun" and world.is_main else None
            chosen = fitting.settled(config, train=train, world=world, recorded=begun)
            if begun is not None and chosen.parts != begun.parts:
                atomic.write(folder.config, to_json(chosen))
            start = partial(Run, folder=folder, train=train, val=val, world=world, stopwatch=stopwatch, stop=stop)
            images, ranks = fitting.images_of_rank(chosen, train, world), world.ranks
            split = partial(fitting.split_further, config, images=images, ranks=ranks)
            has_finished = _carry_out(start, chosen, folder, split=split, has_begun=state == "begun")
            world.from_main(None)  # rank 0 may still be at its closing work
            return has_finished


def _carry_out(
    start: Callable[[Config], Run],
    config: Config,
    folder: RunFolder,
    *,
    split: Callable[..., tuple[Config, str]],
    has_begun: bool,
) -> bool:
    """Take a run to its end; where the GPU's memory runs out, take up its newest checkpoint in smaller parts.

    split: what fitting.split_further does to a configuration and the words of a failure.
    """
    used_before_s: float | None = None
    line = ""
    while True:
        this: Run | None = None
        try:
            this = start(config)
            if has_begun:
                this.take_up(used_before_s)
            if line:
                this.note_parts(line)
            return this.go(is_new=not has_begun)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            failure = " ".join(str(error).partition("\n")[0].split())
        if this is not None:
            has_begun, used_before_s = this.has_begun, this.used_before_s
        del this  # and all that it holds on the GPU
        config, line = split(config, failure=failure)
        if has_begun:
            atomic.write(folder.config, to_json(config))


def check_data(config: Config, train: Reader, val: Reader | None, world: World) -> None:
    """Raise ConfigError where the files do not serve the run, or its batches do not divide among the ranks."""
    batch, micro = config.recipe.batch_size, config.parts
    if batch > len(train):
        raise ConfigError(
            f"batch size {batch} exceeds the {len(train)} images of {train.path}; give a smaller --batch-size"
        )
    mine = fitting.images_of_rank(config, train, world)
    if mine % micro or mine < 2 * micro:
        raise ConfigError(
            f"{mine} images a rank do not make {micro} equal micro-batches of 2 images or more; "
            "give another --micro-batches or --batch-size"
        )
    if config.engine == "graph" and world.ranks > 1:
        raise ConfigError("a CUDA graph holds one rank's step alone; give --engine eager or compile under torchrun")
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
        torch.backends.cudnn.benchmark = not config.deterministic  # shapes repeat for hours: cuDNN may time algorithms
        if config.deterministic:
            make_deterministic()
        self.model = BYOL(
            recipe.encoder,
            recipe.head,
            seed=config.seed,
            target_statistics=recipe.target_statistics,
            objective=recipe.objective,
        ).to(config.device)
        self.model.online.encoder.recomputes(config.recomputes)
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
        self.used_before_s = 0.0  # by earlier processes
        self.has_begun = False  # its folder is its own

    def take_up(self, used_before_s: float | None = None) -> None:
        """Continue from the newest checkpoint that reads; from the start if the run was stopped before its first.

        used_before_s: what earlier processes used, where this one has counted it already.

        Rank 0 reads it for all. The clock takes up what earlier processes are known to have used: up to that checkpoint
        or the last row.
        """
        used_s = [row["elapsed_s"] + row.get("score_s", 0.0) for row in read_metrics(self.folder.metrics)[-1:]]
        state: dict[str, Any] | None = None
        damaged: list[str] = []
        if self.world.is_main and checkpoint.exists(self.folder.checkpoints):
            state, damaged = checkpoint.load_newest(self.folder.checkpoints)
        state = self.world.from_main(state)
        if state is not None:
            self.loop.restore(state)
            self.epochs = state["epochs"]
            used_s.append(state["elapsed_s"])
        for line in damaged:
            self.loop.logger.warn(line)
        if damaged:
            checkpoint.drop_after(self.folder.checkpoints, self.loop.position.step)
        self.has_begun = True
        self.used_before_s = max(used_s, default=0.0) if used_before_s is None else used_before_s
        if used_before_s is None:
            self.stopwatch.add(self.used_before_s)

    def note_parts(self, line: str) -> None:
        """Warn of how a step is computed since memory ran out, and keep it for the result: from which step on."""
        self.loop.logger.warn(line)
        self.loop.notes.setdefault("micro_batches_from_step", []).append([self.loop.position.step, self.config.parts])

    def go(self, *, is_new: bool) -> bool:
        """Plan, train and close; True when finished, False when a signal came first."""
        deadline_s, score_until_s = self._deadline_s(), None
        if self.loop.position.progress < 1.0:
            planned = self.plan(deadline_s)
            if planned is not None:
                if is_new and self.world.is_main:
                    initialize(self.folder, self.config)
                self.has_begun = True
                if not self.fit(*planned):
                    return False
                if isinstance(planned[0], ClockPlan):
                    score_until_s = planned[0].score_until_s
        self.loop.engine.release()
        if self.world.is_main:
            self.closing.carry_out(deadline_s=deadline_s, score_until_s=score_until_s)
        return True

    def _deadline_s(self) -> float | None:
        """Give the end of the process in seconds of the run; None for a run that counts epochs."""
        if self.config.deadline is not None:
            return self.stopwatch.at(self.config.deadline)
        return self.config.budget_s

    def plan(self, deadline_s: float | None) -> tuple[Plan, Schedule] | None:
        """Rehearse the closing work, measure a step, and make plan and schedules, alike on every rank.

        None where a resumed run has no time left but for the closing work, however long that takes.
        """
        began_s = self.stopwatch.elapsed_s()
        if self.world.is_main:
            self.closing.rehearse()
        rehearsed_s = self.world.from_main(self.stopwatch.elapsed_s())
        if deadline_s is None:
            recipe, epochs = self.config.recipe, self.config.epochs
            assert epochs is not None
            steps = max(math.ceil(epochs * len(self.train) / recipe.batch_size), 1)
            return StepPlan(steps), schedule.planned(recipe, epochs=epochs)
        return self._clock_plan(deadline_s, began_s=began_s, rehearsed_s=rehearsed_s)

    def _clock_plan(
        self, deadline_s: float, *, began_s: float, rehearsed_s: float
    ) -> tuple[ClockPlan, Schedule] | None:
        """Measure a step, and plan for the clock; see plan."""
        recipe = self.config.recipe
        in_flight = STEPS_AHEAD if self.config.device == "cuda" else 0
        plan = ClockPlan(deadline_s, Reserve(dict(self.closing.seconds)), in_flight)
        if not self._has_time(plan, step_s=0.0):
            return None
        step_s = self._step_s(plan)
        plan.reserve.rehearsed_step = (recipe.crop_px, step_s)
        plan.reserve.best[recipe.crop_px] = step_s
        plan.reserve.parts["recalibrate"] = RECALIBRATION * step_s * recipe.recalibrate
        if not self._has_time(plan, step_s=step_s):
            return None
        now_s = self.stopwatch.elapsed_s()
        steps = (plan.end_s - now_s - self._scores_s(plan)) / (step_s * schedule.relative_cost(recipe))
        fitting = (self.loop.position.step + max(steps, 1.0)) * recipe.batch_size / len(self.train)
        made = schedule.planned(recipe, epochs=self.world.from_main(self.epochs or fitting), warmup_max=WARMUP_MAX)
        self.loop.notes["plan"] = {
            "budget_s": deadline_s,
            "startup_s": began_s - self.used_before_s,
            "rehearsal_s": rehearsed_s - began_s,
            "calibration_s": now_s - rehearsed_s,
            "epochs_that_fit": fitting,
            "step_s": step_s,
            "reserve_s": plan.deadline_s - plan.end_s,
            "closing_s": dict(plan.reserve.parts),
            "base_lr": made.base_lr,
            "tau_base": made.tau_base,
        }
        if self.world.is_main:
            print(_told(self.loop.notes["plan"], made), file=sys.stderr)
        return plan, made

    def _step_s(self, plan: ClockPlan) -> float:
        """Measure a step at full crop size, on every rank."""
        loop, left_s = self.loop, plan.end_s - self.stopwatch.elapsed_s()
        recipe = self.config.recipe
        intervals, made = Intervals(), schedule.planned(recipe, epochs=recipe.epochs, warmup_max=WARMUP_MAX)
        batches = loop.pipeline.batches(loop.position.step)

        def timed_step() -> float:
            began_s = self.stopwatch.elapsed_s()
            loop.step(batches, made, intervals, progress=1.0)
            if self.config.device == "cuda":
                torch.cuda.synchronize()
            return self.stopwatch.elapsed_s() - began_s

        try:
            measured = calibrate.measure(
                timed_step,
                loop.live,
                warm_up=step.WARM_UP if self.config.engine == "graph" else 0,
                left_s=left_s,
                agree=self.world.from_main,
                is_settled=lambda: loop.threads.is_settled(recipe.crop_px),
                settle=loop.threads.settle,
                compiles=self.config.device == "cuda",
            )
        finally:
            batches.close()
        if measured.is_cold:
            loop.logger.warn(
                f"the first step, which compiles and chooses algorithms, took {measured.step_s:.0f} of the "
                f"{left_s:.0f} s that were left; the plan takes it for a usual one, so give a longer --budget"
            )
        return measured.step_s

    def _scores_s(self, plan: ClockPlan) -> float:
        """Estimate what the scores in the midst of training will take; raise ConfigError where that is too much."""
        count = self.loop.scores_ahead()
        each_s, left_s = self.world.from_main(
            (self.closing.seconds.get("evaluate", 0.0), plan.end_s - self.stopwatch.elapsed_s())
        )
        if self.loop.position.step == 0 and count * each_s > SCORES_MAX * left_s:
            raise ConfigError(
                f"{count} scores of {each_s:.1f} s each by --knn-at take more than {SCORES_MAX:.0%} of the "
                f"{left_s:.0f} s that are left to train; give fewer, or a longer --budget"
            )
        seconds: float = count * each_s
        return seconds

    def _has_time(self, plan: ClockPlan, *, step_s: float) -> bool:
        """Tell whether a step fits, by rank 0's clock; raise ConfigError where none does and nothing is trained yet."""
        elapsed_s, end_s = self.world.from_main((self.stopwatch.elapsed_s(), plan.end_s))
        if elapsed_s + step_s < end_s:
            return True
        at = self.loop.position
        if at.step == 0:
            given, closing_s = format_duration(max(plan.deadline_s, 0)), plan.deadline_s - end_s
            raise ConfigError(
                f"a budget of {given} leaves no time to train: {elapsed_s:.0f} s are used, a step takes "
                f"{step_s:.1f} s, and {closing_s:.0f} s are needed to evaluate and save; give a longer --budget"
            )
        self.loop.logger.warn(f"no time is left to train; the run is closed at {at.progress:.0%} of its way")
        return False

    def fit(self, plan: Plan, made: Schedule) -> bool:
        """Train to the end of the plan: True; or to a signal: False. A run that ends early gets its report, too."""
        try:
            finished = self.loop.run(plan, made, score=self.closing.knn_top1)
        except Diverged:
            self._report_unfinished()
            raise
        if not finished:
            self._report_unfinished()
        return finished

    def _report_unfinished(self) -> None:
        """Write the report as things stand; the ranks leave together, so that none is taken for lost."""
        if self.world.is_main:
            try:
                self.closing.report(None)
            except OSError as error:
                self.loop.logger.warn(f"the report could not be written: {error}")
        self.world.from_main(None)


def _told(plan: dict[str, Any], made: Schedule) -> str:
    return (
        f"fits {plan['epochs_that_fit']:.3g} epochs at {1000 * plan['step_s']:.3g} ms a step; "
        f"base lr {made.base_lr:.3g}, tau {made.tau_base:.4g}, warm-up {made.warmup:.1%} of the run; "
        f"{plan['reserve_s']:.1f} s kept to evaluate and save"
    )
