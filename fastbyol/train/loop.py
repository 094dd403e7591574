"""Training loop: batch, views, step, metrics row; checkpoints; an end by plan, signal or watchdog."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch
from fastbyol.byol import Output, embedding_std
from fastbyol.config import Config
from fastbyol.errors import ConfigError
from fastbyol.evaluate.features import CLASSES_MAX
from fastbyol.loaders.batch import Batch
from fastbyol.monitor.logger import RunLogger
from fastbyol.monitor.metrics import Intervals
from fastbyol.monitor.watchdog import Watchdog
from fastbyol.optim import LARS
from fastbyol.schedule import Schedule
from fastbyol.storage.checkpoint import Saver
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system import threads
from fastbyol.system.device import STEPS_AHEAD, HostCopy, Throttle, queue_copy
from fastbyol.system.distributed import World
from fastbyol.system.signals import StopSignal
from fastbyol.train import calibrate
from fastbyol.train.inputs import Pipeline
from fastbyol.train.plan import ClockPlan, Plan
from fastbyol.train.probe import Probe
from fastbyol.train.step import Eager

ScoreFunction = Callable[[Callable[[], bool]], float | None]  # of the current model; None if its argument stops it


@dataclass(frozen=True)
class Position:
    """The position of a run: steps taken, progress in [0, 1], seconds spent in the loop."""

    step: int = 0
    progress: float = 0.0
    train_s: float = 0.0


def _build_probe(config: Config, reader: Reader, world: World, *, features: int) -> Probe | None:
    """Build the online probe for a labelled file; None without labels, or with a label outside the classes."""
    if reader.labels is None or reader.labels.min() < 0 or reader.labels.max() >= CLASSES_MAX:
        return None
    classes = int(reader.labels.max()) + 1
    probe = Probe(features, classes, config.recipe.optim, seed=config.seed + 3, device=config.device)
    probe.group = world.group
    return probe


class Loop:
    """The training of one model from a position to the end of a plan; updates model, optimiser and `position`.

    On several ranks, rank 0 keeps clock, plan, rows and checkpoints; the others receive its decisions after every step.
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
        self.probe = _build_probe(config, reader, world, features=self.model.online.encoder.features)
        self.pipeline = Pipeline(config, reader, world, precision=engine.precision)
        self.saver = Saver(folder.checkpoints, device=config.device)
        self.logger = RunLogger(config, folder, world, reader=reader)
        self.threads = threads.make_tuner(
            config.threads, config.device, processes=world.local_ranks, notify=self.logger.warn
        )
        self.throttle = Throttle(config.device)
        self.watchdog = Watchdog(dimensions=config.recipe.head.out, stops_on_collapse=config.stop_on_collapse)
        self.position = Position()
        self.scored_at: set[float] = set()  # the part of config.knn_at that is done
        self.skipped_samples = 0
        self._skipped_in_batch = 0
        self.notes: dict[str, Any] = {}

    def state(self, *, with_momenta: bool = False) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain values.

        with_momenta: include the parameters in place of momenta that the optimiser does not have yet, so that the state
        is as large as after the first step.
        """
        is_fresh = with_momenta and not self.optimizer.state
        trainable = [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
        return {
            **({"momenta to come": trainable} if is_fresh else {}),
            "images": len(self.reader),
            "elapsed_s": self.stopwatch.elapsed_s(),
            "epochs": None if self.schedule is None else self.schedule.epochs,
            "step": self.position.step,
            "progress": self.position.progress,
            "train_s": self.position.train_s,
            "skipped_steps": self.optimizer.skipped,
            "skipped_samples": self.skipped_samples,
            "scored": sorted(self.scored_at),
            "low_since": self.watchdog.low_since,
            "notes": self.notes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state that state() returned; raise ConfigError if the data file has changed."""
        if state["images"] != len(self.reader):
            raise ConfigError(
                f"{self.reader.path} holds {len(self.reader)} images; the run began with {state['images']}; "
                "give the file it began with, or another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.probe is not None and state.get("probe") is not None:  # absent from checkpoints of version 0.1
            self.probe.load_state_dict(state["probe"])
        self.optimizer.skipped.copy_(state["skipped_steps"])
        self.scored_at = set(state.get("scored", ()))  # likewise
        self.skipped_samples = state["skipped_samples"]
        self.position = Position(state["step"], state["progress"], state["train_s"])
        self.notes = state["notes"]
        self.watchdog.low_since = state["low_since"]
        self.saver.saved_step = state["step"]

    def trained_tensors(self) -> dict[Hashable, Tensor]:
        """Return every tensor that a step changes."""
        tensors, probe = calibrate.trained_tensors(self.model, self.optimizer), self.probe
        if probe is not None:
            tensors |= {**calibrate.trained_tensors(probe.classifier, probe.optimizer), "probe sums": probe.sums}
        return tensors

    def run(self, plan: Plan, schedule: Schedule, *, score: ScoreFunction) -> bool:
        """Train to the end of the plan and return True, or to a signal and return False; checkpoint either way.

        Rank 0 calls `score` at the shares in config.knn_at. A signal during the last checkpoint still returns False.
        Raises Diverged if the watchdog finds no use in going on; earlier checkpoints stay.
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
                self._warn_of_failed_save()
        (stops,) = self.world.total([float(self.stop.has_arrived)])
        return self.position.progress == 1.0 and not stops

    def save(self) -> None:
        """Start writing a checkpoint of the current position, on rank 0 only."""
        if self.world.is_main and self.saver.saved_step != self.position.step:
            self.saver.save(self.state(), step=self.position.step)

    def step(self, batches: Iterator[Batch], schedule: Schedule, intervals: Intervals, *, progress: float) -> Output:
        """Take one step on the next batch, with the rates and crop size of a progress in [0, 1]."""
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
                output = self.engine.accumulate(parts, count=config.parts, **rates)
            if self.probe is not None and batch.labels is not None:
                labels = queue_copy(torch.from_numpy(batch.labels), config.device)
                self.probe.step(output.representations, labels, lr=rates["lr"])
        self.throttle.after_step()
        intervals.lap("step_s")
        intervals.images += len(batch.indices) * self.world.ranks
        self._skipped_in_batch = len(batch.skipped)
        return output

    def remaining_scores(self) -> int:
        """Return the number of scores in config.knn_at that are not done yet."""
        return len(set(self.config.knn_at) - self.scored_at)

    def _train(self, plan: Plan, schedule: Schedule, score: ScoreFunction) -> None:
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
                self._update_reserve(plan, schedule, step_s=now_s - step_began_s)
                progress, is_stopped = self._agree(plan, since_s=since_s, now_s=now_s)
                self.position = Position(self.position.step + 1, progress, start.train_s + now_s - began_s)
                intervals.lap("agree_s")
                self.logger.step()
                intervals.lap("log_s")
                is_over = progress == 1.0 or is_stopped
                due = {share for share in config.knn_at if share <= progress < 1.0} - self.scored_at
                if is_over or due or self.position.step % config.log_every == 0:
                    row, numbers = self._start_row(schedule, elapsed_s=now_s), self._numbers(output)
                    intervals.lap("log_s")
                    if due and not is_stopped:
                        row |= self._take_score(plan, score, due, now_s=now_s)
                        intervals.skip()  # a score counts neither as the loop's time nor as progress
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
                    while rows and self.world.ranks == 1:  # ranks save by their own clocks; rows need all ranks
                        self._write(*rows.popleft())
                    saved_s = now_s if self._save_if_good(output) else saved_s
                    intervals.lap("checkpoint_s")
            self.save()  # before anything is closed, which may be slow

    def _take_score(self, plan: Plan, score: ScoreFunction, due: set[float], *, now_s: float) -> dict[str, float]:
        """Score the model on rank 0 for the shares that are due; return the row's entries.

        The score is given up after half of the time left; after a signal it is left to the resumed run.
        """
        until_s = (now_s + plan.end_s) / 2 if isinstance(plan, ClockPlan) else math.inf
        top1 = None
        if self.world.is_main:
            with self.stop.on_stall(self._save_while_stalled):
                top1 = score(lambda: self.stop.has_arrived or self.stopwatch.elapsed_s() > until_s)
        # the other ranks wait here, as long as it takes, and not in the next step
        if self.world.from_main(top1 is not None or not self.stop.has_arrived):
            self.scored_at |= due
        seconds = self.stopwatch.elapsed_s() - now_s
        if top1 is None:
            if not self.stop.has_arrived:
                self.logger.warn(f"no time was left for the score at {max(due):g} of the run")
            return {"score_s": seconds}
        if isinstance(plan, ClockPlan):
            plan.reserve.record_piece("evaluate", seconds)
        return {"knn_top1": top1, "score_s": seconds}

    def _has_time(self, plan: Plan, now_s: float) -> bool:
        """Tell whether a checkpoint started now would be written before the last one is due."""
        return not isinstance(plan, ClockPlan) or now_s + 2 * self.saver.cost.total_s() < plan.end_s

    def _update_reserve(self, plan: Plan, schedule: Schedule, *, step_s: float) -> None:
        """Record the current cost of steps and checkpoints in the reserve."""
        if isinstance(plan, ClockPlan):
            plan.reserve.record_step(schedule.crop_px(self.position.progress), step_s)
            if self.saver.pop_finished():
                plan.reserve.record_piece("checkpoint", self.saver.cost.total_s())

    def _agree(self, plan: Plan, *, since_s: float, now_s: float) -> tuple[float, bool]:
        """Return progress by rank 0's plan, and whether a signal on any rank stops the run; alike on all ranks."""
        progress = 0.0
        if self.world.is_main:
            step = self.position.step + 1
            progress = plan.advance(self.position.progress, step=step, since_s=since_s, now_s=now_s)
            if plan.is_over(step, now_s=now_s):
                progress = 1.0
        progress, stops, skipped = self.world.total(
            [progress, float(self.stop.has_arrived), float(self._skipped_in_batch)]
        )
        self.skipped_samples += int(skipped)
        return progress, stops > 0

    def _numbers(self, output: Output) -> HostCopy:
        """Start copying the numbers of a row from the device."""
        spread = embedding_std(output.target_projections)
        probe = [] if self.probe is None else self.probe.take_sums().unbind()
        return HostCopy(
            torch.stack([x.detach().double() for x in (output.loss, spread, *self.optimizer.skipped, *probe)])
        )

    def _write(self, row: dict[str, Any], left_s: float, numbers: HostCopy) -> None:
        """Complete a row with its numbers, show it to the watchdog, and write it."""
        *local, skipped, skipped_in_a_row = (values := numbers.read())[:4]
        probe = values[4:]
        loss, std = (value / self.world.ranks for value in self.world.total(local))
        row |= {"loss": loss, "embedding_std": std, "skipped_steps": int(skipped)}
        if probe:
            row |= {f"probe_{name}": x for name, x in Probe.metrics(*probe)._asdict().items()}
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

    def _start_row(self, schedule: Schedule, *, elapsed_s: float) -> dict[str, Any]:
        """Return the row of the current position without the numbers on the device."""
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
        """Save unless a checkpoint is being written or the last step was not finite (host sync); tell whether."""
        self._warn_of_failed_save()
        is_good = math.isfinite(output.loss.item()) and int(self.optimizer.skipped[1]) == 0
        if not is_good or self.saver.is_writing:
            return False
        self.save()
        return True

    def _save_while_stalled(self) -> None:
        """Save the position if a signal arrived while no images come: a disk that hangs may stall the loop forever."""
        if self.position.step:
            self.save()
            self.saver.wait()
            self._warn_of_failed_save()
        is_saved = self.saver.saved_step == self.position.step
        saved = f"step {self.position.step} is saved" if is_saved else "nothing new is saved"
        self.logger.warn(f"asked to stop while no images come; {saved}; a second signal ends the run at once")

    def _warn_of_failed_save(self) -> None:
        failure = self.saver.pop_failure()
        if failure is not None:
            newest = "none is" if self.saver.saved_step is None else f"that of step {self.saver.saved_step} is"
            self.logger.warn(f"a checkpoint could not be written ({failure}); {newest} on disk, and training goes on")
