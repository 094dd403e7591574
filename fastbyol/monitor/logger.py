"""Logger of a training run: rows, warnings and profile, written by rank 0 alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fastbyol.beton import Reader
from fastbyol.budget import format_duration
from fastbyol.config import Config
from fastbyol.loaders import decoding_threads
from fastbyol.monitor.flops import Meter
from fastbyol.monitor.metrics import _rows_and_ends, extend_last_row, peak_gib
from fastbyol.monitor.profiler import Profile
from fastbyol.monitor.starvation import StarvationMonitor
from fastbyol.monitor.tensorboard import EventFile, TensorBoardSink, scalars
from fastbyol.monitor.wandb_sink import WandbRun
from fastbyol.storage.files import RecordFile
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.distributed import World

LINE_EVERY_S = 30.0  # without a terminal


class Sink(Protocol):
    """A further destination of rows, beside metrics.jsonl; neither method may raise."""

    def write(self, row: dict[str, Any]) -> None:
        """Write one row."""

    def close(self) -> None:
        """Write what is still held, and close."""


class Telemetry:
    """The rows and the progress of one run; a context manager, on the one process that writes.

    path: metrics.jsonl. Rows of steps after `from_step` are dropped first, since those steps are taken again.
    tensorboard: the folder of event files, None for none. extra_sink: a further sink, closed with this one.
    pending_warnings: the warnings that no row holds: those from before and, once closed, those after the last row.
    Raises OSError where a file cannot be opened; a disk that fills up later costs warnings, not the run.
    """

    def __init__(
        self,
        path: Path,
        *,
        from_step: int,
        tensorboard: Path | None = None,
        extra_sink: Sink | None = None,
        pending_warnings: list[str] | None = None,
    ) -> None:
        self._pending_warnings = [] if pending_warnings is None else pending_warnings
        ends = [end for row, end in _rows_and_ends(path) if row["step"] <= from_step]
        self._rows = RecordFile(path, warn=self.warn, keep_bytes=max(ends, default=0))
        self._sinks: list[Sink] = [] if extra_sink is None else [extra_sink]
        if tensorboard is not None:
            self._sinks.append(TensorBoardSink(tensorboard, first_step=from_step + 1, warn=self.warn))
        self._bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {desc}", disable=None, file=sys.stderr)
        self._next_line_s = -math.inf

    def warn(self, text: str) -> None:
        """Print a warning of one line at once, and keep it for the next row (`warnings`)."""
        tqdm.write(f"warning: {text}", file=sys.stderr)
        self._pending_warnings.append(text)

    def write_row(self, row: dict[str, Any], *, left_s: float) -> None:
        """Append one row to metrics.jsonl and the sinks, and show progress; left_s: seconds to the end of the run."""
        if self._pending_warnings:
            row = {**row, "warnings": [*self._pending_warnings]}
            self._pending_warnings.clear()
        self._rows.append(json.dumps(row).encode() + b"\n")
        self.write_to_sinks(row)
        text = describe(row, left_s=left_s)
        if not self._bar.disable:
            self._bar.n = min(row["progress"], 1.0)
            self._bar.set_description_str(text)
        elif row["elapsed_s"] >= self._next_line_s or row["progress"] == 1.0:
            print(f"{100 * row['progress']:3.0f}%  {text}", file=sys.stderr, flush=True)
            self._next_line_s = row["elapsed_s"] + LINE_EVERY_S

    def write_to_sinks(self, row: dict[str, Any]) -> None:
        """Write a row to the sinks beside metrics.jsonl alone."""
        for sink in self._sinks:
            sink.write(row)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        for sink in self._sinks:
            sink.close()
        self._rows.close()


def describe(row: dict[str, Any], *, left_s: float) -> str:
    """Return a line of progress, without what the row does not hold."""
    parts = [f"step {row['step']}", f"epoch {row['epoch']:.2f}", f"loss {row['loss']:.3f}"]
    parts.append(f"{row['images_per_s']:.0f} images/s")
    if "loader_wait_share" in row:
        parts.append(f"{100 * row['loader_wait_share']:.0f} % waiting")
    if "mfu" in row:
        parts.append(f"{100 * row['mfu']:.0f} % MFU")
    if "peak_gib" in row:
        parts.append(f"{row['peak_gib']:.1f} GiB")
    return "  ".join((*parts, f"{format_duration(left_s)} left"))


class RunLogger:
    """The logger of one run, on every rank; only rank 0 writes, and only inside open().

    `pending_warnings` holds the warnings that no row holds, for the report. reader: the training images; their size
    decides how many threads decode.
    """

    def __init__(self, config: Config, folder: RunFolder, world: World, *, reader: Reader) -> None:
        self.config, self.folder, self.world = config, folder, world
        self.pending_warnings: list[str] = []
        self._telemetry: Telemetry | None = None
        self._profile: Profile | None = None
        self.decoding_threads = decoding_threads(config.loader, reader, workers=config.workers)
        self._starvation = StarvationMonitor(
            threads=self.decoding_threads,
            loader=config.loader,
            local_ranks=world.local_ranks,
            ranks=world.ranks,
        )
        name = torch.cuda.get_device_name() if config.device == "cuda" else None
        self._meter = Meter(config.recipe, device_name=name, precision=config.precision, gpus=world.ranks)

    @contextmanager
    def open(self, *, from_step: int) -> Iterator[None]:
        """Open the files of rank 0 for the with-block; drop rows after `from_step`, whose steps are taken again."""
        if not self.world.is_main:
            yield
            return
        config, folder = self.config, self.folder
        with ExitStack() as stack:
            extra_sink = None
            if config.wandb is not None:
                name, settings = str(folder.path), asdict(config)
                extra_sink = WandbRun(
                    config.wandb, folder=folder.path, name=name, settings=settings, is_new=from_step == 0
                )
            tensorboard = folder.tensorboard if config.tensorboard else None
            self._telemetry = stack.enter_context(
                Telemetry(
                    folder.metrics,
                    from_step=from_step,
                    tensorboard=tensorboard,
                    extra_sink=extra_sink,
                    pending_warnings=self.pending_warnings,
                )
            )
            if config.profile:
                profile = Profile(folder.profile, device=config.device, warn=self.warn)
                self._profile = stack.enter_context(profile)
            try:
                yield
            finally:
                self._telemetry = self._profile = None

    def warn(self, text: str) -> None:
        """Print a warning on rank 0 and keep it for the next row or, after the last row, for the report."""
        if self._telemetry is not None:
            self._telemetry.warn(text)
        elif self.world.is_main:
            print(f"warning: {text}", file=sys.stderr)
            self.pending_warnings.append(text)

    def log_row(self, row: dict[str, Any], *, left_s: float) -> None:
        """Write a row, completed by peak memory and utilisation; warn where training waits for data."""
        if self._telemetry is None:
            return
        if warning := self._starvation.update(row):
            self.warn(warning)
        measured = self._meter.read(row["images_per_s"], crop_px=row["crop_px"])
        self._telemetry.write_row({**row, "peak_gib": peak_gib(self.config.device), **measured}, left_s=left_s)

    def log_initial_scores(self, scores: Mapping[str, float]) -> None:
        """Show the scores of the encoder before training, where there are any, as step 0 of the sinks."""
        if self._telemetry is not None and scores:
            self._telemetry.write_to_sinks({"step": 0, **scores})

    def extend_last_row(self, entries: Mapping[str, float]) -> None:
        """Add entries to the last row, after the loop has ended, and write them for TensorBoard; warn where that fails.

        W&B does not get them: its run is finished, and would have to be resumed over the network.
        """
        if not entries:
            return
        try:
            step = extend_last_row(self.folder.metrics, entries)
            if step is not None and self.config.tensorboard:
                events = EventFile(self.folder.tensorboard, first_step=step + 1, warn=self.warn)
                events.write(step, scalars(dict(entries)))
                events.close()
        except OSError as error:
            self.warn(f"the last row lacks the scores of the trained encoder: {error}; result.json has them")

    def step(self) -> None:
        """Advance the profiler after a step."""
        if self._profile is not None:
            self._profile.step()
