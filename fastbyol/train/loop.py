"""Training loop: batch, views, step, metrics row; checkpoints; an end by plan, signal or watchdog."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch
from fastbyol.config import Config
from fastbyol.errors import ConfigError
from fastbyol.loaders.batch import Batch
from fastbyol.model.byol import Output
from fastbyol.monitor.logger import RunLogger
from fastbyol.monitor.metrics import Intervals
from fastbyol.monitor.watchdog import Watchdog
from fastbyol.schedule import Schedule
from fastbyol.storage.checkpoint import Saver
from fastbyol.storage.identity import Identity, identify
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system import threads
from fastbyol.system.device import Throttle, queue_copy
from fastbyol.system.distributed import World
from fastbyol.system.signals import StopSignal
from fastbyol.train import calibrate
from fastbyol.train.inputs import Pipeline
from fastbyol.train.plan import Plan
from fastbyol.train.probe import build_probe
from fastbyol.train.rows import RowWriter
from fastbyol.train.saving import Checkpoints, moments_to_come
from fastbyol.train.session import Position, ScoreFunction, Session
from fastbyol.train.step import Eager


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
        self.probe = build_probe(config, reader, world, features=self.model.online.encoder.features)
        self.pipeline = Pipeline(config, reader, world, precision=engine.precision)
        self.saver = Saver(folder.checkpoints, device=config.device)
        self.logger = RunLogger(config, folder, world, reader=reader)
        self.checkpoints = Checkpoints(self.saver, self.state, warn=self.logger.warn, saves=world.is_main)
        self.threads = threads.make_tuner(
            config.threads, config.device, processes=world.local_ranks, notify=self.logger.warn
        )
        self.throttle = Throttle(config.device)
        self.watchdog = Watchdog(dimensions=config.recipe.head.out, stops_on_collapse=config.stop_on_collapse)
        self.rows = RowWriter(
            config,
            reader,
            world,
            optimizer=self.optimizer,
            probe=self.probe,
            watchdog=self.watchdog,
            logger=self.logger,
        )
        self.position = Position()
        self.scored_at: set[float] = set()  # the part of config.score_shares that is done
        self.skipped_samples = 0
        self._skipped_in_batch = 0
        self.notes: dict[str, Any] = {}
        self.initial_scores: dict[str, float] = {}  # of the encoder before the first step, from the rehearsal
        self.data = identify(reader)

    def state(self, *, with_momenta: bool = False) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain values.

        with_momenta: include parameters in place of the moments that the optimisers do not have yet, so that the state
        is as large as after the first step.
        """
        to_come = moments_to_come(self.model, self.optimizer) if with_momenta else []
        if with_momenta and self.probe is not None:
            to_come += moments_to_come(self.probe.classifier, self.probe.optimizer)
        return {
            **({"momenta to come": to_come} if to_come else {}),
            "images": len(self.reader),
            "data": list(self.data),
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
        if "data" in state and not Identity(*state["data"]).is_of(self.data):  # absent from checkpoints of version 0.1
            raise ConfigError(
                f"{self.reader.path} holds other images than the run began with; give those, or another --out"
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

        Rank 0 calls `score` at config.score_shares. A signal during the last checkpoint still returns False.
        Raises Diverged if the watchdog finds no use in going on; earlier checkpoints stay.
        """
        self.schedule, self.throttle = schedule, Throttle(self.config.device)  # without calibration's steps
        start, now_s = self.position, self.stopwatch.elapsed_s()
        session, is_stopped = Session(plan, schedule, score, start, now_s, now_s, now_s), False
        with (
            self.stop.defer(),
            self.checkpoints.awaited(),
            self.logger.open(from_step=start.step),
            closing(self.pipeline.batches(start.step)) as batches,
        ):
            if start.step == 0:
                self.logger.log_initial_scores(self.initial_scores)
            while self.position.progress < 1.0 and not is_stopped:
                step_began_s = self.stopwatch.elapsed_s()
                output = self.step(batches, schedule, session.intervals, progress=self.position.progress)
                is_stopped = self._advance(session, step_began_s=step_began_s)
                self._add_row(session, output, is_stopped=is_stopped)
                self._save_if_due(session, output)
            self.checkpoints.save(self.position.step)  # before anything is closed, which may be slow
        (stops,) = self.world.total([float(self.stop.has_arrived)])
        return self.position.progress == 1.0 and not stops

    def step(self, batches: Iterator[Batch], schedule: Schedule, intervals: Intervals, *, progress: float) -> Output:
        """Take one step on the next batch, with the rates and crop size of a progress in [0, 1]."""
        config = self.config
        with self.stop.on_stall(lambda: self.checkpoints.save_while_stalled(self.position.step)):
            batch = next(batches)
        self.throttle.before_step(wait_s=intervals.lap("loader_wait_s"))
        rates = {"lr": schedule.learning_rate(progress), "tau": schedule.tau(progress)}
        if schedule.objective.fade:
            self.model.set_beta(schedule.beta(progress))
        crop_px = schedule.crop_px(progress)
        with self.threads.unit(crop_px):
            parts = self.pipeline.views(batch, crop_px, intervals)
            if config.parts == 1:
                output = self.engine(*next(parts), **rates)
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
        """Return the number of scores at config.score_shares that are not taken yet."""
        return len(self.config.score_shares - self.scored_at)

    def _advance(self, session: Session, *, step_began_s: float) -> bool:
        """Move the position by the step just taken; return whether a signal stops the run."""
        plan, at = session.plan, self.position
        since_s, session.now_s = session.now_s, self.stopwatch.elapsed_s()
        plan.record_step(session.schedule.crop_px(at.progress), session.now_s - step_began_s)
        if self.saver.pop_finished():
            plan.record_piece("checkpoint", self.saver.cost.total_s())
        progress, is_stopped = self._agree(plan, since_s=since_s, now_s=session.now_s)
        self.position = Position(at.step + 1, progress, session.start.train_s + session.now_s - session.began_s)
        session.intervals.lap("agree_s")
        self.logger.step()
        session.intervals.lap("log_s")
        return is_stopped

    def _add_row(self, session: Session, output: Output, *, is_stopped: bool) -> None:
        """Add a row where one is due, with a score where one is due, and write the rows that are complete."""
        progress, intervals = self.position.progress, session.intervals
        is_over = progress == 1.0 or is_stopped
        due = {share for share in self.config.score_shares if share <= progress < 1.0} - self.scored_at
        if is_over or due or self.position.step % self.config.log_every == 0:
            row = self.rows.start(
                self.position, session.schedule, elapsed_s=session.now_s, skipped_samples=self.skipped_samples
            )
            numbers = self.rows.copy_numbers(output)
            intervals.lap("log_s")
            if due and not is_stopped:
                row |= self._take_score(session, due)
                session.leave_out(row["score_s"])
                self.throttle.pause()
            self.rows.append(
                row | intervals.take(gpu_idle=self.throttle.take_idle()), numbers, left_s=session.left_s(progress)
            )
        if is_over:
            self.rows.write_all()
        else:
            self.rows.write_due(self.position.step)
        intervals.lap("log_s")

    def _take_score(self, session: Session, due: set[float]) -> dict[str, float]:
        """Score the model on rank 0 for the shares that are due; return the row's entries.

        The score is given up after half of the time left. One that a signal cuts short is left to the resumed run,
        also where a part of it is known.
        """
        until_s = (session.now_s + session.plan.end_s) / 2
        scores: dict[str, float] = {}
        is_cut = False

        def cut() -> bool:
            nonlocal is_cut
            is_cut = self.stop.has_arrived or self.stopwatch.elapsed_s() > until_s
            return is_cut

        if self.world.is_main:
            with self.stop.on_stall(lambda: self.checkpoints.save_while_stalled(self.position.step)):
                scores = session.score(cut)
        # the other ranks wait here, as long as it takes, and not in the next step
        if self.world.from_main(not (is_cut and self.stop.has_arrived)):
            self.scored_at |= due
        seconds = self.stopwatch.elapsed_s() - session.now_s
        if not is_cut:
            session.plan.record_piece("evaluate", seconds)
        elif not self.stop.has_arrived:
            what = "measures without labels" if scores else "score"
            self.logger.warn(f"no time was left for the {what} at {max(due):g} of the run")
        return {**scores, "score_s": seconds}

    def _save_if_due(self, session: Session, output: Output) -> None:
        """Save if the interval is over and the checkpoint would be written before the last one is due."""
        now_s, cost = session.now_s, self.saver.cost
        is_due = now_s - session.saved_s > (self.config.checkpoint_s or cost.interval_s())
        if not is_due or now_s + 2 * cost.total_s() >= session.plan.end_s:
            return
        if self.world.ranks == 1:  # ranks save by their own clocks; rows need all ranks
            self.rows.write_all()
        if self.checkpoints.save_if_good(self.position.step, output, self.optimizer):
            session.saved_s = now_s
        session.intervals.lap("checkpoint_s")

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
