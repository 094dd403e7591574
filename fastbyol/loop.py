"""Know the training loop: batch, views, step, row; checkpoints when due; an end by plan, signal or divergence."""

from __future__ import annotations

import math
import signal
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch

from fastbyol import checkpoint, schedule, views
from fastbyol.beton import Reader
from fastbyol.budget import ClockPlan, StepPlan, Stopwatch
from fastbyol.byol import Output, embedding_std
from fastbyol.config import Config, ConfigError
from fastbyol.device import Pace, queue_copy
from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders import Batch, load
from fastbyol.order import Rows, stream
from fastbyol.probe import Probe
from fastbyol.runfolder import RunFolder
from fastbyol.step import Eager
from fastbyol.telemetry import Intervals, Telemetry


class Diverged(RuntimeError):
    """Tell that the loss is no longer a number, at which step, and what to do."""


@dataclass(frozen=True)
class Position:
    """Say how far a run has come: steps taken, progress in [0, 1], seconds spent in the loop."""

    step: int = 0
    progress: float = 0.0
    train_s: float = 0.0


class StopSignal:
    """Remember a SIGINT or SIGTERM until the loop looks; the second one interrupts at once."""

    def __init__(self) -> None:
        self.arrived = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.arrived:
            raise KeyboardInterrupt
        self.arrived = True

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside the with-block; restore what was there after it."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _probe_of(config: Config, reader: Reader, *, features: int) -> Probe | None:
    """Build the online probe of a labelled file; None for one without labels, or with a label that names no class."""
    if reader.labels is None or reader.labels.min() < 0:
        return None
    classes = int(reader.labels.max()) + 1
    return Probe(features, classes, config.recipe.optim, seed=config.seed + 3, device=config.device)


class Loop:
    """Train one model from a position to the end of a plan. Moves model, optimiser and `position`."""

    def __init__(self, config: Config, *, reader: Reader, engine: Eager, folder: RunFolder) -> None:
        self.config = config
        self.reader = reader
        self.engine = engine
        self.model, self.optimizer = engine.model, engine.optimizer
        self.folder = folder
        self.probe = _probe_of(config, reader, features=engine.model.online.encoder.features)
        self.pace = Pace(config.device)
        self.position = Position()
        self.skipped_samples = 0
        self.notes: dict[str, Any] = {}

    def state(self, *, elapsed_s: float) -> dict[str, Any]:
        """Gather all that a resumed run needs, as tensors and plain values."""
        return {
            "images": len(self.reader),
            "elapsed_s": elapsed_s,
            "step": self.position.step,
            "progress": self.position.progress,
            "train_s": self.position.train_s,
            "skipped_steps": self.optimizer.skipped,
            "skipped_samples": self.skipped_samples,
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
        self.skipped_samples = state["skipped_samples"]
        self.position = Position(state["step"], state["progress"], state["train_s"])
        self.notes = state["notes"]

    def save(self, stopwatch: Stopwatch) -> None:
        """Write a checkpoint of the position."""
        state = self.state(elapsed_s=stopwatch.elapsed_s())
        checkpoint.save(self.folder.checkpoints, state, step=self.position.step)

    def run(self, plan: StepPlan | ClockPlan, stopwatch: Stopwatch) -> bool:
        """Train until the plan is over: True; or until a signal: False. Either way the position is checkpointed.

        Raises Diverged when the loss is not finite at a row or checkpoint; the checkpoints before it stay.
        """
        stop = StopSignal()
        with stop.caught():
            self.save(stopwatch)
            self._train(plan, stopwatch, stop)
            self.save(stopwatch)
        return self.position.progress == 1.0

    def _train(self, plan: StepPlan | ClockPlan, stopwatch: Stopwatch, stop: StopSignal) -> None:
        start, config = self.position, self.config
        rows = stream(start.step, batch_size=config.recipe.batch_size, count=len(self.reader), seed=config.seed)
        intervals, saved_s = Intervals(), stopwatch.elapsed_s()
        began_s = saved_s
        self.model.train()
        with (
            Telemetry(self.folder.metrics, from_step=start.step) as telemetry,
            closing(self._load(rows)) as batches,
        ):
            while self.position.progress < 1.0 and not stop.arrived:
                elapsed_s = stopwatch.elapsed_s()
                progress = plan.progress(self.position.step, elapsed_s=elapsed_s)
                output = self._step(batches, progress, intervals)
                step, now_s = self.position.step + 1, stopwatch.elapsed_s()
                step_s = now_s - elapsed_s
                self.position = Position(step, plan.progress(step, elapsed_s=now_s), start.train_s + now_s - began_s)
                if now_s - saved_s > config.checkpoint_s:
                    self._require_finite(output)
                    self.save(stopwatch)
                    saved_s = now_s = stopwatch.elapsed_s()
                    intervals.skip()
                if plan.is_over(step, elapsed_s=now_s, step_s=step_s):
                    self.position = replace(self.position, progress=1.0)
                if self.position.progress == 1.0 or stop.arrived or step % config.log_every == 0:
                    self._require_finite(output)
                    done = max(self.position.progress - start.progress, 1e-9)
                    left_s = (now_s - began_s) * (1 - self.position.progress) / done
                    telemetry.row(self._row(output, intervals.take(), elapsed_s=now_s), left_s=left_s)
                    intervals.lap("log_s")

    def _load(self, rows: Iterator[Rows]) -> Generator[Batch, None, None]:
        config = self.config
        return load(
            config.loader,
            self.reader,
            rows,
            workers=config.workers,
            ahead=config.prefetch,
            on_error=config.on_error,
            device=config.device,
        )

    def _step(self, batches: Iterator[Batch], progress: float, intervals: Intervals) -> Output:
        recipe = self.config.recipe
        batch = next(batches)
        intervals.lap("loader_wait_s")
        drawn = views.draw(
            recipe.views, seed=self.config.seed, epochs=batch.epochs, indices=batch.indices, sizes=batch.sizes.numpy()
        )
        device = self.config.device
        pixels, offsets, sizes, packed = (
            queue_copy(tensor, device) for tensor in (batch.pixels, batch.offsets, batch.sizes, drawn.packed)
        )
        images = views.apply(
            pixels, offsets, sizes, ViewParams(packed), crop_px=recipe.crop_px, dtype=self.engine.precision
        )
        intervals.lap("views_s")
        lr = schedule.learning_rate(progress, peak=recipe.peak_lr, warmup=self.config.warmup)
        output = self.engine(
            images,
            lr=lr,
            tau=schedule.ema_rate(progress, base=recipe.optim.tau_base, rises=recipe.optim.tau_rises),
        )
        if self.probe is not None and batch.labels is not None:
            self.probe.step(output.representations, queue_copy(torch.from_numpy(batch.labels), device), lr=lr)
        self.pace.step_queued()
        intervals.lap("step_s")
        intervals.images += len(batch.indices)
        self.skipped_samples += len(batch.skipped)
        return output

    def _require_finite(self, output: Output) -> None:
        """Raise Diverged unless the loss is a number (host sync)."""
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {self.position.step}; lower --base-lr "
                f"(now {self.config.recipe.optim.base_lr:g}) and start anew"
            )

    def _row(self, output: Output, times: dict[str, float], *, elapsed_s: float) -> dict[str, Any]:
        """Describe the run after a step (host sync); lr and tau are those of the position's progress."""
        recipe, at = self.config.recipe, self.position
        return {
            "step": at.step,
            "epoch": at.step * recipe.batch_size / len(self.reader),
            "progress": at.progress,
            "elapsed_s": elapsed_s,
            "loss": output.loss.item(),
            "lr": schedule.learning_rate(at.progress, peak=recipe.peak_lr, warmup=self.config.warmup),
            "tau": schedule.ema_rate(at.progress, base=recipe.optim.tau_base, rises=recipe.optim.tau_rises),
            "embedding_std": embedding_std(output.target_projections),
            **({} if self.probe is None else {f"probe_{name}": x for name, x in self.probe.read()._asdict().items()}),
            "skipped_steps": int(self.optimizer.skipped[0]),
            "skipped_samples": self.skipped_samples,
            **times,
        }
