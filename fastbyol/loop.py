"""Know the training loop: batch, views, step, row; checkpoints when due; an end by plan, signal or watchdog."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbyol import calibrate, threads
from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch
from fastbyol.byol import Output, embedding_std
from fastbyol.config import Config, ConfigError
from fastbyol.device import STEPS_AHEAD, HostCopy, Throttle, queue_copy
from fastbyol.distributed import World
from fastbyol.evaluate.features import CLASSES_MAX
from fastbyol.loaders import Batch
from fastbyol.optim import LARS
from fastbyol.pipeline import Pipeline
from fastbyol.plan import ClockPlan, Plan
from fastbyol.probe import Probe
from fastbyol.runfolder import RunFolder
from fastbyol.saver import Saver
from fastbyol.schedule import Schedule
from fastbyol.signals import StopSignal
from fastbyol.step import Eager
from fastbyol.telemetry import Intervals
from fastbyol.teller import RunLogger
from fastbyol.watchdog import Watchdog

Score = Callable[[Callable[[], bool]], float | None]  # of the model as it is; None once what is given says to stop


@dataclass(frozen=True)
class Position:
    """Say how far a run has come: steps taken, progress in [0, 1], seconds spent in the loop."""

    step: int = 0
    progress: float = 0.0
    train_s: float = 0.0


def _probe_of(config: Config, reader: Reader, world: World, *, features: int) -> Probe | None:
    """Build the online probe of a labelled file; None for one without labels, or with a label that names no class."""
    if reader.labels is None or reader.labels.min() < 0 or reader.labels.max() >= CLASSES_MAX:
        return None
    classes = int(reader.labels.max()) + 1
    probe = Probe(features, classes, config.recipe.optim, seed=config.seed + 3, device=config.device)
    probe.group = world.group
    return probe


class Loop:
    """Train one model from a position to the end of a plan. Moves model, optimiser and `position`.

    On several ranks rank 0 keeps clock, plan, rows and checkpoints; the others learn after every step what it decided.
    """

    def __init__(
        self,
        config: Config,
        *,
        reader: Reader,
        engine: Eager,
        folder: RunFolder,
        world: World,
        stopwatch: Stopwatch,
        stop: StopSignal,
    ) -> None:
        self.config, self.reader, self.engine, self.folder = config, reader, engine, folder
        self.world, self.stopwatch, self.stop = world, stopwatch, stop
        self.model, self.optimizer = engine.model, engine.optimizer
        self.schedule: Schedule | None = None
        self.probe = _probe_of(config, reader, world, features=self.model.online.encoder.features)
        self.pipeline = Pipeline(config, reader, world, precision=engine.precision)
        self.saver = Saver(folder.checkpoints, device=config.device)
        self.logger = RunLogger(config, folder, world, reader=reader)
        self.threads = threads.make_tuner(
            config.threads, config.device, processes=world.local_ranks, notify=self.logger.warn
        )
        self.throttle = Throttle(config.device)
        self.watchdog = Watchdog(dimensions=config.recipe.head.out, stops_on_collapse=config.stop_on_collapse)
        self.position = Position()
        self.scored: set[float] = set()  # shares of config.knn_at
        self.skipped_samples = 0
        self._skipped_now = 0
        self.notes: dict[str, Any] = {}

    def state(self, *, with_momenta: bool = False) -> dict[str, Any]:
        """Gather all that a resumed run needs, as tensors and plain values.

        with_momenta: let the parameters stand for the momenta where the optimiser has none yet, so that a copy of the
        state is as large as after the first step.
        """
        is_fresh = with_momenta and not self.optimizer.state
        trained = [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
        return {
            **({"momenta to come": trained} if is_fresh else {}),
            "images": len(self.reader),
            "elapsed_s": self.stopwatch.elapsed_s(),
            "epochs": None if self.schedule is None else self.schedule.epochs,
            "step": self.position.step,
            "progress": self.position.progress,
            "train_s": self.position.train_s,
            "skipped_steps": self.optimizer.skipped,
            "skipped_samples": self.skipped_samples,
            "scored": sorted(self.scored),
            "low_since": self.watchdog.low_since,
            "notes": self.notes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what state() gathered; raise ConfigError when the data are no longer the same."""
        if state["images"] != len(self.reader):
            raise ConfigError(
                f"{self.reader.path} holds {len(self.reader)} images, {state['images']} when the run began; "
                "give the file it began with, or another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.probe is not None and state.get("probe") is not None:  # absent from checkpoints of 0.1
            self.probe.load_state_dict(state["probe"])
        self.optimizer.skipped.copy_(state["skipped_steps"])
        self.scored = set(state.get("scored", ()))  # absent, too
        self.skipped_samples = state["skipped_samples"]
        self.position = Position(state["step"], state["progress"], state["train_s"])
        self.notes = state["notes"]
        self.watchdog.low_since = state["low_since"]
        self.saver.saved_step = state["step"]

    def live(self) -> dict[Hashable, Tensor]:
        """Name every tensor that a step moves."""
        named, probe = calibrate.tensors(self.model, self.optimizer), self.probe
        if probe is not None:
            named |= {**calibrate.tensors(probe.classifier, probe.optimizer), "probe sums": probe.sums}
        return named

    def run(self, plan: Plan, schedule: Schedule, *, score: Score) -> bool:
        """Train until the plan is over: True; or until a signal: False. Either way the position is checkpointed.

        `score` is taken on rank 0 where the configuration says. A signal that comes while the last checkpoint is
        written counts, too. Raises Diverged where the watchdog sees no use in going on; the checkpoints before it stay.
        """
        self.schedule = schedule
        with self.stop.defer():
            try:
                self._train(plan, schedule, score)
            except KeyboardInterrupt:  # a second signal: quit at once
                self.saver.abandon()
                raise
            finally:
                self.saver.wait()
                self._look_after_saver()
        (stops,) = self.world.total([float(self.stop.has_arrived)])
        return self.position.progress == 1.0 and not stops

    def save(self) -> None:
        """Begin to write a checkpoint of the position; rank 0 alone does."""
        if self.world.is_main and self.saver.saved_step != self.position.step:
            self.saver.save(self.state(), step=self.position.step)

    def step(self, batches: Iterator[Batch], schedule: Schedule, intervals: Intervals, *, progress: float) -> Output:
        """Take the next batch through views and engine, at the rates of a progress."""
        config = self.config
        with self.stop.on_stall(self._save_while_stalled):
            batch = next(batches)
        intervals.lap("loader_wait_s")
        rates = {"lr": schedule.learning_rate(progress), "tau": schedule.tau(progress)}
        crop_px = schedule.crop_px(progress)
        with self.threads.unit(crop_px):
            parts = self.pipeline.views(batch, crop_px, intervals)
            if config.parts == 1:
                output = self.engine(next(parts), **rates)
            else:
                output = self.engine.accumulate(parts, of=config.parts, **rates)
            if self.probe is not None and batch.labels is not None:
                labels = queue_copy(torch.from_numpy(batch.labels), config.device)
                self.probe.step(output.representations, labels, lr=rates["lr"])
        self.throttle.after_step()
        intervals.lap("step_s")
        intervals.images += len(batch.indices) * self.world.ranks
        self._skipped_now = len(batch.skipped)
        return output

    def scores_ahead(self) -> int:
        """Count the scores that the configuration wants and that have not been taken."""
        return len(set(self.config.knn_at) - self.scored)

    def _train(self, plan: Plan, schedule: Schedule, score: Score) -> None:
        config, start = self.config, self.position
        began_s = saved_s = now_s = self.stopwatch.elapsed_s()
        intervals, is_stopped = Intervals(), False
        rows: deque[tuple[dict[str, Any], float, HostCopy]] = deque()  # whose numbers may still be on their way
        behind = (
            STEPS_AHEAD if config.device == "cuda" else 0
        )  # steps, after which a GPU has them: nothing waits for a row
        with self.logger.open(from_step=start.step), closing(self.pipeline.batches(start.step)) as batches:
            while self.position.progress < 1.0 and not is_stopped:
                step_began_s = self.stopwatch.elapsed_s()
                output = self.step(batches, schedule, intervals, progress=self.position.progress)
                since_s, now_s = now_s, self.stopwatch.elapsed_s()
                self._look_at_pace(plan, schedule, step_s=now_s - step_began_s)
                progress, is_stopped = self._agree(plan, since_s=since_s, now_s=now_s)
                self.position = Position(self.position.step + 1, progress, start.train_s + now_s - began_s)
                intervals.lap("agree_s")
                self.logger.step()
                intervals.lap("log_s")
                is_over = progress == 1.0 or is_stopped
                due = {share for share in config.knn_at if share <= progress < 1.0} - self.scored
                if is_over or due or self.position.step % config.log_every == 0:
                    row, numbers = self._row(schedule, elapsed_s=now_s), self._numbers(output)
                    intervals.lap("log_s")
                    if due and not is_stopped:
                        row |= self._scored(plan, score, due, now_s=now_s)
                        intervals.skip()  # neither the loop's time nor progress
                        began_s, now_s = began_s + row["score_s"], now_s + row["score_s"]
                    row |= intervals.take()
                    done = max(progress - start.progress, 1e-9)
                    rows.append((row, (now_s - began_s) * (1 - progress) / done, numbers))
                while rows and (is_over or rows[0][0]["step"] <= self.position.step - behind):
                    self._write(*rows.popleft())
                    intervals.lap("log_s")
                if now_s - saved_s > (config.checkpoint_s or self.saver.cost.interval_s()) and self._has_time(
                    plan, now_s
                ):
                    while rows and self.world.ranks == 1:  # ranks save by clocks of their own, and rows are of them all
                        self._write(*rows.popleft())
                    saved_s = now_s if self._save_if_good(output) else saved_s
                    intervals.lap("checkpoint_s")
            self.save()  # before anything is closed, which may take its time

    def _scored(self, plan: Plan, score: Score, due: set[float], *, now_s: float) -> dict[str, float]:
        """Score the model on rank 0 for shares that are due: what the row tells of it.

        It is given up when half of the time that is left has gone, and left for the resumed run where a signal comes.
        """
        until_s = (now_s + plan.end_s) / 2 if isinstance(plan, ClockPlan) else math.inf
        found = None
        if self.world.is_main:
            with self.stop.on_stall(self._save_while_stalled):
                found = score(lambda: self.stop.has_arrived or self.stopwatch.elapsed_s() > until_s)
        # the others wait here, as long as it takes, and not in the next step
        if self.world.from_main(found is not None or not self.stop.has_arrived):
            self.scored |= due
        seconds = self.stopwatch.elapsed_s() - now_s
        if found is None:
            if not self.stop.has_arrived:
                self.logger.warn(f"no time was left for the score at {max(due):g} of the run")
            return {"score_s": seconds}
        if isinstance(plan, ClockPlan):
            plan.reserve.note_piece("evaluate", seconds)
        return {"knn_top1": found, "score_s": seconds}

    def _has_time(self, plan: Plan, now_s: float) -> bool:
        """Tell whether a checkpoint begun now would be written before the last one is due."""
        return not isinstance(plan, ClockPlan) or now_s + 2 * self.saver.cost.total_s() < plan.end_s

    def _look_at_pace(self, plan: Plan, schedule: Schedule, *, step_s: float) -> None:
        """Let the reserve follow what steps and checkpoints cost now."""
        if isinstance(plan, ClockPlan):
            plan.reserve.note_step(schedule.crop_px(self.position.progress), step_s)
            if self.saver.pop_finished():
                plan.reserve.note_piece("checkpoint", self.saver.cost.total_s())

    def _agree(self, plan: Plan, *, since_s: float, now_s: float) -> tuple[float, bool]:
        """Let rank 0 say how far the run is, and any rank that it must stop: progress, and whether to stop."""
        progress = 0.0
        if self.world.is_main:
            step = self.position.step + 1
            progress = plan.advance(self.position.progress, step=step, since_s=since_s, now_s=now_s)
            if plan.is_over(step, now_s=now_s):
                progress = 1.0
        progress, stops, skipped = self.world.total([progress, float(self.stop.has_arrived), float(self._skipped_now)])
        self.skipped_samples += int(skipped)
        return progress, stops > 0

    def _numbers(self, output: Output) -> HostCopy:
        """Begin to copy what a row needs from the device."""
        spread = embedding_std(output.target_projections)
        probe = [] if self.probe is None else self.probe.take().unbind()
        return HostCopy(
            torch.stack([x.detach().double() for x in (output.loss, spread, *self.optimizer.skipped, *probe)])
        )

    def _write(self, row: dict[str, Any], left_s: float, numbers: HostCopy) -> None:
        """Complete a row by its numbers, show it to the watchdog, and write it."""
        *local, skipped, skipped_in_a_row = (values := numbers.read())[:4]
        probe = values[4:]
        loss, std = (value / self.world.ranks for value in self.world.total(local))
        row |= {"loss": loss, "embedding_std": std, "skipped_steps": int(skipped)}
        if probe:
            row |= {f"probe_{name}": x for name, x in Probe.reading(*probe)._asdict().items()}
        warning = self.watchdog.inspect(
            step=row["step"],
            progress=row["progress"],
            loss=loss,
            embedding_std=std,
            skipped_in_a_row=int(skipped_in_a_row) if isinstance(self.optimizer, LARS) else None,
        )
        if warning:
            self.logger.warn(warning)
        self.logger.log_row(row, left_s=left_s)

    def _row(self, schedule: Schedule, *, elapsed_s: float) -> dict[str, Any]:
        """Describe the run after a step, but for what is on the device; rates and crop size are of its progress."""
        at = self.position
        return {
            "step": at.step,
            "epoch": at.step * self.config.recipe.batch_size / len(self.reader),
            "progress": at.progress,
            "elapsed_s": elapsed_s,
            "lr": schedule.learning_rate(at.progress),
            "tau": schedule.tau(at.progress),
            "crop_px": schedule.crop_px(at.progress),
            "skipped_samples": self.skipped_samples,
            "threads": torch.get_num_threads(),
        }

    def _save_if_good(self, output: Output) -> bool:
        """Save unless a checkpoint is still being written, or the last step was no good (host sync); tell whether."""
        self._look_after_saver()
        is_good = math.isfinite(output.loss.item()) and int(self.optimizer.skipped[1]) == 0
        if not is_good or self.saver.is_writing:
            return False
        self.save()
        return True

    def _save_while_stalled(self) -> None:
        """Save what there is when a signal came and no images come: a disk that hangs may never let the loop go on."""
        if self.position.step:
            self.save()
            self.saver.wait()
            self._look_after_saver()
        is_saved = self.saver.saved_step == self.position.step
        told = f"step {self.position.step} is saved" if is_saved else "nothing new is saved"
        self.logger.warn(f"asked to stop while no images come; {told}, and a second signal ends the run at once")

    def _look_after_saver(self) -> None:
        failure = self.saver.pop_failure()
        if failure is not None:
            kept = "none is" if self.saver.saved_step is None else f"that of step {self.saver.saved_step} is"
            self.logger.warn(f"a checkpoint could not be written ({failure}); {kept} on disk, and training goes on")
