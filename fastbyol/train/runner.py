"""One run as a whole: from a configuration or a checkpoint to a scored and exported encoder with a report."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from fastbyol import optim, schedule
from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch, format_duration
from fastbyol.byol import BYOL
from fastbyol.config import Config, to_json
from fastbyol.errors import ConfigError
from fastbyol.evaluate import features
from fastbyol.jpeg import require_pillow
from fastbyol.monitor.metrics import Intervals, read_metrics
from fastbyol.monitor.watchdog import Diverged
from fastbyol.schedule import Schedule
from fastbyol.storage import checkpoint, files
from fastbyol.storage.run_folder import RunFolder, check_resumable, check_unused, initialize, lock
from fastbyol.system.device import STEPS_AHEAD, make_deterministic
from fastbyol.system.distributed import World, join_ranks
from fastbyol.system.signals import StopSignal
from fastbyol.train import calibrate, larc, memory, micro_batches, step
from fastbyol.train.finish import Closing
from fastbyol.train.loop import Loop
from fastbyol.train.plan import ClockPlan, Plan, Reserve, StepPlan

OPTIMIZERS: dict[str, Callable[..., step.Optimizer]] = {"lars": optim.build, "apex-larc": larc.LARC}
WARMUP_MAX = 0.25  # of a run by the clock; the paper's shortest preset warms up for 10 of 40 epochs
SCORES_SHARE_MAX = 0.5  # of the training time at most goes into scores
RECALIBRATION_STEPS = 0.5  # the time of one batch, in steps: loading, views and one forward


def run(
    config: Config,
    folder: RunFolder,
    *,
    stopwatch: Stopwatch,
    stop: StopSignal,
    resume: bool = False,
    overwrite: bool = False,
) -> bool:
    """Run a configuration in its folder; return True when finished, False when a signal stopped it (resumable).

    stopwatch: counts the seconds of the budget; stop: receives the signals. Under torchrun every rank calls this
    function. With `resume`, a run is started if the folder holds none. Raises ConfigError, BetonError or
    CheckpointError for unusable input, before anything is overwritten; OSError from the disk; watchdog.Diverged;
    distributed.RankLost.
    """
    require_pillow()
    val_reader = nullcontext() if config.val is None else Reader(config.val)
    with join_ranks(config.device) as world, Reader(config.data) as train, val_reader as val:
        check_data(config, train, val, world)
        state = world.from_main(
            _folder_state(folder, config, resume=resume, overwrite=overwrite) if world.is_main else ""
        )
        if state == "finished":
            if world.is_main:
                print(f"{folder.path} has already finished", file=sys.stderr)
            return True
        with lock(folder) if world.is_main else nullcontext():
            recorded = folder.read_config() if state == "started" and world.is_main else None
            chosen = micro_batches.choose_micro_batches(config, train=train, world=world, recorded=recorded)
            if recorded is not None and chosen.parts != recorded.parts:
                files.write(folder.config, to_json(chosen))
            build = partial(Run, folder=folder, train=train, val=val, world=world, stopwatch=stopwatch, stop=stop)
            images, ranks = micro_batches.images_of_rank(chosen, train, world), world.ranks
            split = partial(micro_batches.split_further, config, images=images, ranks=ranks)
            is_finished = _run_to_end(build, chosen, folder, split=split, has_started=state == "started")
            world.from_main(None)  # rank 0 may still be doing its closing work
            return is_finished


def _run_to_end(
    build: Callable[[Config], Run],
    config: Config,
    folder: RunFolder,
    *,
    split: Callable[..., tuple[Config, str]],
    has_started: bool,
) -> bool:
    """Run to the end; whenever the GPU runs out of memory, resume the newest checkpoint in smaller micro-batches.

    split: fitting.split_further, as a function of the configuration and `failure`.
    """
    used_before_s: float | None = None
    line = ""
    while True:
        attempt: Run | None = None
        try:
            attempt = build(config)
            if has_started:
                attempt.resume(used_before_s)
            if line:
                attempt.record_micro_batches(line)
            return attempt.execute(is_new=not has_started)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            failure = " ".join(str(error).partition("\n")[0].split())
        if attempt is not None:
            has_started, used_before_s = attempt.has_started, attempt.used_before_s
        del attempt  # and all that it holds on the GPU
        config, line = split(config, failure=failure)
        if has_started:
            files.write(folder.config, to_json(config))


def check_data(config: Config, train: Reader, val: Reader | None, world: World) -> None:
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
            f"engine graph under torchrun with {world.ranks} ranks; a CUDA graph holds a step of one rank only; "
            "give --engine eager or compile"
        )
    if val is not None:
        features.check_classes(train, val)


def _folder_state(folder: RunFolder, config: Config, *, resume: bool, overwrite: bool) -> str:
    """Return "new", "started" or "finished" for the folder's run; raise ConfigError if the folder cannot be used."""
    if not resume or not folder.config.exists():
        if resume:
            print(f"{folder.path} holds no run yet; starting one", file=sys.stderr)
        check_unused(folder, overwrite=overwrite)
        return "new"
    check_resumable(folder, config)
    return "finished" if folder.result.exists() else "started"


class Run:
    """One attempt at a run: its model, optimiser and loop, taken from its position to its result."""

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
        torch.backends.cudnn.benchmark = not config.deterministic  # shapes repeat for hours, so cuDNN's search pays
        if config.deterministic:
            make_deterministic()
        self.model = BYOL(
            recipe.encoder,
            recipe.head,
            seed=config.seed,
            target_statistics=recipe.target_statistics,
            objective=recipe.objective,
        ).to(config.device)
        self.model.online.encoder.set_recompute(config.recomputes)
        target_of = {} if recipe.lagged_target else self.model.target_of()
        optimizer = OPTIMIZERS[config.optimizer](self.model, target_of, recipe.optim)
        engine = step.engine(
            config.engine, self.model, optimizer, precision=config.precision, lagged_target=recipe.lagged_target
        )
        if world.group is not None:
            engine.distribute(world.group)
        self.loop = Loop(
            config, reader=train, engine=engine, folder=folder, world=world, stopwatch=stopwatch, stop=stop
        )
        self.closing = Closing(config, folder, train=train, val=val, loop=self.loop)
        self.epochs: float | None = None  # for which an earlier process built the schedules
        self.used_before_s = 0.0  # by earlier processes
        self.has_started = False  # the folder belongs to this run

    def resume(self, used_before_s: float | None = None) -> None:
        """Restore the newest readable checkpoint; without any checkpoint, start at step 0.

        Rank 0 reads it for all ranks. The stopwatch adds the seconds that earlier processes are known to have used, up
        to that checkpoint or the last row. used_before_s: those seconds, if the stopwatch has counted them already.
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
        self.has_started = True
        self.used_before_s = max(used_s, default=0.0) if used_before_s is None else used_before_s
        if used_before_s is None:
            self.stopwatch.add_earlier(self.used_before_s)

    def record_micro_batches(self, line: str) -> None:
        """Warn how a step is computed since memory ran out, and record from which step on in the result."""
        self.loop.logger.warn(line)
        self.loop.notes.setdefault("micro_batches_from_step", []).append([self.loop.position.step, self.config.parts])

    def execute(self, *, is_new: bool) -> bool:
        """Plan, train and do the closing work; return True when finished, False when a signal came first."""
        deadline_s, score_until_s = self._deadline_s(), None
        if self.loop.position.progress < 1.0:
            planned = self.plan(deadline_s)
            if planned is not None:
                if is_new and self.world.is_main:
                    initialize(self.folder, self.config)
                self.has_started = True
                if not self.train_to_end(*planned):
                    return False
                if isinstance(planned[0], ClockPlan):
                    score_until_s = planned[0].score_until_s
        self.loop.engine.release()
        if self.world.is_main:
            self.closing.finish(deadline_s=deadline_s, score_until_s=score_until_s)
        return True

    def _deadline_s(self) -> float | None:
        """Return the end of the process in seconds of the run; None for a run of a number of epochs."""
        if self.config.deadline is not None:
            return self.stopwatch.elapsed_at(self.config.deadline)
        return self.config.budget_s

    def plan(self, deadline_s: float | None) -> tuple[Plan, Schedule] | None:
        """Rehearse the closing work, measure a step, and return plan and schedules, equal on all ranks.

        None if a resumed run has only time left for the closing work, or not even that.
        """
        began_s = self.stopwatch.elapsed_s()
        if self.world.is_main:
            self.closing.rehearse()
        rehearsed_s = self.world.from_main(self.stopwatch.elapsed_s())
        if deadline_s is None:
            recipe, epochs = self.config.recipe, self.config.epochs
            assert epochs is not None
            steps = max(math.ceil(epochs * len(self.train) / recipe.batch_size), 1)
            return StepPlan(steps), schedule.build(recipe, epochs=epochs)
        return self._clock_plan(deadline_s, began_s=began_s, rehearsed_s=rehearsed_s)

    def _clock_plan(
        self, deadline_s: float, *, began_s: float, rehearsed_s: float
    ) -> tuple[ClockPlan, Schedule] | None:
        """Measure a step and plan by the clock; see plan."""
        recipe = self.config.recipe
        in_flight = STEPS_AHEAD if self.config.device == "cuda" else 0
        plan = ClockPlan(deadline_s, Reserve(dict(self.closing.seconds)), in_flight)
        if not self._has_time(plan, step_s=0.0):
            return None
        step_s = self._step_s(plan)
        plan.reserve.rehearsed_step = (recipe.crop_px, step_s)
        plan.reserve.fastest_s[recipe.crop_px] = step_s
        plan.reserve.closing_s["recalibrate"] = RECALIBRATION_STEPS * step_s * recipe.recalibrate
        if not self._has_time(plan, step_s=step_s):
            return None
        now_s = self.stopwatch.elapsed_s()
        steps = (plan.end_s - now_s - self._scores_s(plan)) / (step_s * schedule.relative_cost(recipe))
        epochs_that_fit = (self.loop.position.step + max(steps, 1.0)) * recipe.batch_size / len(self.train)
        epochs = self.world.from_main(self.epochs or epochs_that_fit)
        schedules = schedule.build(recipe, epochs=epochs, warmup_max=WARMUP_MAX)
        self.loop.notes["plan"] = {
            "budget_s": deadline_s,
            "startup_s": began_s - self.used_before_s,
            "rehearsal_s": rehearsed_s - began_s,
            "calibration_s": now_s - rehearsed_s,
            "epochs_that_fit": epochs_that_fit,
            "step_s": step_s,
            "reserve_s": plan.deadline_s - plan.end_s,
            "closing_s": dict(plan.reserve.closing_s),
            "base_lr": schedules.base_lr,
            "tau_base": schedules.tau_base,
        }
        if self.world.is_main:
            print(_plan_summary(self.loop.notes["plan"], schedules), file=sys.stderr)
        return plan, schedules

    def _step_s(self, plan: ClockPlan) -> float:
        """Measure the seconds of a step at full crop size, on every rank."""
        loop, left_s = self.loop, plan.end_s - self.stopwatch.elapsed_s()
        recipe = self.config.recipe
        intervals, schedules = Intervals(), schedule.build(recipe, epochs=recipe.epochs, warmup_max=WARMUP_MAX)
        batches = loop.pipeline.batches(loop.position.step)

        def timed_step() -> float:
            began_s = self.stopwatch.elapsed_s()
            loop.step(batches, schedules, intervals, progress=1.0)
            if self.config.device == "cuda":
                torch.cuda.synchronize()
            return self.stopwatch.elapsed_s() - began_s

        try:
            measured = calibrate.measure_step(
                timed_step,
                loop.trained_tensors,
                warm_up=step.WARM_UP if self.config.engine == "graph" else 0,
                left_s=left_s,
                agree=self.world.from_main,
                has_threads=lambda: loop.threads.is_settled(recipe.crop_px),
                choose_threads=loop.threads.settle,
                compiles=self.config.device == "cuda",
            )
        finally:
            batches.close()
        if measured.is_cold:
            loop.logger.warn(
                f"the first step, which compiles and chooses algorithms, took {measured.step_s:.0f} of the "
                f"{left_s:.0f} s left; the plan assumes that every step takes as long; give a longer --budget"
            )
        return measured.step_s

    def _scores_s(self, plan: ClockPlan) -> float:
        """Estimate the seconds of the scores during training; raise ConfigError if they are too many."""
        count = self.loop.remaining_scores()
        each_s, left_s = self.world.from_main(
            (self.closing.seconds.get("evaluate", 0.0), plan.end_s - self.stopwatch.elapsed_s())
        )
        if self.loop.position.step == 0 and count * each_s > SCORES_SHARE_MAX * left_s:
            raise ConfigError(
                f"{count} scores of {each_s:.1f} s each for --knn-at take more than {SCORES_SHARE_MAX:.0%} of the "
                f"{left_s:.0f} s that are left to train; give fewer, or a longer --budget"
            )
        seconds: float = count * each_s
        return seconds

    def _has_time(self, plan: ClockPlan, *, step_s: float) -> bool:
        """Tell whether a step fits, by rank 0's clock; raise ConfigError if none fits in a run without any steps."""
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
        self.loop.logger.warn(f"no time is left to train; the run ends at {at.progress:.0%} of its progress")
        return False

    def train_to_end(self, plan: Plan, schedules: Schedule) -> bool:
        """Train to the end of the plan and return True, or to a signal and return False; report an early end."""
        try:
            finished = self.loop.run(plan, schedules, score=self.closing.knn_top1)
        except Diverged:
            self._report_unfinished()
            raise
        if not finished:
            self._report_unfinished()
        return finished

    def _report_unfinished(self) -> None:
        """Write the report of an unfinished run; all ranks wait for it, so that none is taken for lost."""
        if self.world.is_main:
            try:
                self.closing.report(None)
            except OSError as error:
                self.loop.logger.warn(f"the report could not be written: {error}")
        self.world.from_main(None)


def _plan_summary(plan: dict[str, Any], schedules: Schedule) -> str:
    return (
        f"fits {plan['epochs_that_fit']:.3g} epochs at {1000 * plan['step_s']:.3g} ms a step; "
        f"base lr {schedules.base_lr:.3g}, tau {schedules.tau_base:.4g}, warm-up {schedules.warmup:.1%} of the run; "
        f"{plan['reserve_s']:.1f} s reserved to evaluate and save"
    )
