"""Plan of a run: the closing work is rehearsed and, for a run by the clock, a step is measured."""

from __future__ import annotations

import sys
from typing import Any

from fastbyol import schedule
from fastbyol.budget import format_duration
from fastbyol.errors import ConfigError
from fastbyol.monitor.metrics import Intervals
from fastbyol.recipes.purpose import CPU, PURPOSES
from fastbyol.schedule import Schedule
from fastbyol.system.device import STEPS_AHEAD
from fastbyol.train import calibrate, step
from fastbyol.train.finish import Closing
from fastbyol.train.lengthen import WARMUP_MAX, build_schedule, total_steps
from fastbyol.train.loop import Loop
from fastbyol.train.plan import ClockPlan, Plan, Reserve, StepPlan

SCORES_SHARE_MAX = 0.5  # of the training time at most goes into scores
MEASURED_S = 120.0  # the time to train for which a step of a run by epochs is measured
RECALIBRATION_STEPS = 0.5  # the time of one batch, in steps: loading, views and one forward


class Planner:
    """The planning of one run before its loop starts, on every rank alike.

    epochs: for which an earlier process built the schedules, else None; used_before_s: by earlier processes.
    """

    def __init__(self, loop: Loop, closing: Closing, *, epochs: float | None, used_before_s: float) -> None:
        self.loop, self.closing = loop, closing
        self.config, self.world, self.stopwatch = loop.config, loop.world, loop.stopwatch
        self.epochs, self.used_before_s = epochs, used_before_s

    def plan(self, deadline_s: float | None) -> tuple[Plan, Schedule] | None:
        """Rehearse the closing work, measure a step, and return plan and schedules, equal on all ranks.

        None if a resumed run has only time left for the closing work, or not even that.
        """
        began_s = self.stopwatch.elapsed_s()
        if self.world.is_main:
            self.closing.rehearse()
        rehearsed_s = self.world.from_main(self.stopwatch.elapsed_s())
        if deadline_s is None:
            assert self.config.epochs is not None
            steps = total_steps(self.config, images=len(self.loop.reader))
            return StepPlan(steps), build_schedule(self.config, self.loop.notes, epochs=self.config.epochs)
        return self._clock_plan(deadline_s, began_s=began_s, rehearsed_s=rehearsed_s)

    def _clock_plan(
        self, deadline_s: float, *, began_s: float, rehearsed_s: float
    ) -> tuple[ClockPlan, Schedule] | None:
        """Measure a step and plan by the clock; see plan."""
        recipe = self.config.recipe
        in_flight = STEPS_AHEAD if self.config.device == "cuda" else 0
        plan = ClockPlan(deadline_s, Reserve(dict(self.closing.seconds)), in_flight)
        if not self._has_time(plan):
            return None
        step_s = self._step_s(plan.end_s - self.stopwatch.elapsed_s())
        plan.reserve.rehearsed_step = (recipe.crop_px, step_s)
        plan.reserve.fastest_s[recipe.crop_px] = step_s
        plan.reserve.closing_s["recalibrate"] = RECALIBRATION_STEPS * step_s * recipe.recalibrate
        if not self._has_time(plan, step_s=step_s):
            return None
        now_s = self.stopwatch.elapsed_s()
        steps = (plan.end_s - now_s - self._scores_s(plan)) / (step_s * schedule.relative_cost(recipe))
        epochs_that_fit = (self.loop.position.step + max(steps, 1.0)) * recipe.batch_size / len(self.loop.reader)
        epochs = self.world.from_main(self.epochs or epochs_that_fit)
        schedules = build_schedule(self.config, self.loop.notes, epochs=epochs)
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

    def measure(self) -> float:
        """Measure the seconds of a step of a run by epochs, in about as long as for a short budget."""
        return self._step_s(MEASURED_S)

    def _step_s(self, left_s: float) -> float:
        """Measure the seconds of a step at full crop size, on every rank; left_s: the time to train, a part of it."""
        loop = self.loop
        recipe = self.config.recipe
        intervals, schedules = Intervals(), schedule.build(recipe, epochs=recipe.epochs, warmup_max=WARMUP_MAX)
        on_gpu = self.config.device == "cuda"
        # on a GPU a step takes its time only once the host is as far ahead as the throttle lets it
        warm_up = (step.WARM_UP if self.config.engine == "graph" else 0) + STEPS_AHEAD * on_gpu
        # loader memory decodes an image on its first use alone: most epochs wait for none
        repeated = warm_up + 1 if self.config.loader == "memory" else None
        batches = loop.pipeline.batches(loop.position.step, repeated=repeated)

        def timed_step() -> float:
            began_s = self.stopwatch.elapsed_s()
            loop.step(batches, schedules, intervals, progress=1.0)
            return self.stopwatch.elapsed_s() - began_s

        try:
            measured = calibrate.measure_step(
                timed_step,
                loop.trained_tensors,
                warm_up=warm_up,
                left_s=left_s,
                agree=self.world.from_main,
                has_threads=lambda: loop.threads.is_settled(recipe.crop_px),
                choose_threads=loop.threads.settle,
                compiles=on_gpu,
            )
        finally:
            batches.close()
        if measured.is_cold:
            loop.logger.warn(
                f"the first step, which compiles and chooses algorithms, took {measured.step_s:.0f} of the "
                f"{left_s:.0f} s left; the plan assumes that every step takes as long; give a longer --budget"
            )
        return measured.step_s

    def _recipes_for_a_cpu(self) -> str:
        """Name them where the run is on a CPU and its recipe is for GPUs; "" elsewhere."""
        purpose = PURPOSES.get(self.config.recipe.name.partition("+")[0])
        if self.config.device != "cpu" or purpose is None or purpose.hardware == CPU:
            return ""
        return f", or a recipe for a CPU: {', '.join(name for name, each in PURPOSES.items() if each.hardware == CPU)}"

    def _scores_s(self, plan: ClockPlan) -> float:
        """Estimate the seconds of the scores during training; raise ConfigError if they are too many."""
        count = self.loop.remaining_scores()
        each_s, left_s = self.world.from_main(
            (self.closing.seconds.get("evaluate", 0.0), plan.end_s - self.stopwatch.elapsed_s())
        )
        if self.loop.position.step == 0 and count * each_s > SCORES_SHARE_MAX * left_s:
            raise ConfigError(
                f"{count} scores of {each_s:.1f} s each for --knn-at or --quality-at take more than "
                f"{SCORES_SHARE_MAX:.0%} of the {left_s:.0f} s that are left to train; give fewer, or a longer --budget"
            )
        seconds: float = count * each_s
        return seconds

    def _has_time(self, plan: ClockPlan, *, step_s: float | None = None) -> bool:
        """Tell whether a step fits, by rank 0's clock; raise ConfigError if none fits in a run without any steps.

        step_s: None where no step was measured yet.
        """
        elapsed_s, end_s = self.world.from_main((self.stopwatch.elapsed_s(), plan.end_s))
        if elapsed_s + (step_s or 0.0) < end_s:
            return True
        at = self.loop.position
        if at.step == 0:
            given, closing_s = format_duration(max(plan.deadline_s, 0)), plan.deadline_s - end_s
            taken = "" if step_s is None else f"a step takes {step_s:.1f} s, "
            raise ConfigError(
                f"a budget of {given} leaves no time to train: {elapsed_s:.0f} s are used, {taken}and "
                f"{closing_s:.0f} s are needed to evaluate and save; give a longer --budget{self._recipes_for_a_cpu()}"
            )
        self.loop.logger.warn(f"no time is left to train; the run ends at {at.progress:.0%} of its progress")
        return False


def _plan_summary(plan: dict[str, Any], schedules: Schedule) -> str:
    tau = f"tau {schedules.tau_base:.4g}, " if schedules.objective.moves_target else ""
    return (
        f"fits {plan['epochs_that_fit']:.3g} epochs at {1000 * plan['step_s']:.3g} ms a step; "
        f"base lr {schedules.base_lr:.3g}, {tau}warm-up {schedules.warmup:.1%} of the run; "
        f"{plan['reserve_s']:.1f} s reserved to evaluate and save"
    )
