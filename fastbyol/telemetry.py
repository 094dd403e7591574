"""Live metrics of a run: metrics.jsonl, TensorBoard, W&B, and a progress bar or a line every 30 s."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fastbyol.budget import format_duration
from fastbyol.config import ConfigError
from fastbyol.events import EventFile
from fastbyol.growing import RecordFile

LAPS = ("loader_wait_s", "views_s", "step_s", "agree_s", "log_s", "checkpoint_s")  # of the loop, in a row
LINE_EVERY_S = 30.0  # without a terminal
# TensorBoard's group "learning"; all other numbers are of group "machine".
LEARNING = ("loss", "lr", "tau", "embedding_std", "crop_px", "knn_top1")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every whole row of a metrics.jsonl; leave out a last line cut short by a kill."""
    return [row for row, _ in _rows_and_ends(path)]


def _rows_and_ends(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Pair every whole row with the offset of its end in the file."""
    if not path.exists():
        return []
    rows, end = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        end += len(line) + 1
        try:
            rows.append((json.loads(line), end))
        except ValueError as error:
            raise ConfigError(f"{path} holds a line that is not JSON ({error}); remove that line") from error
    return rows


def peak_gib(device: str) -> float:
    """Return this process's peak memory in GiB: the GPU's as torch counts it, or resident memory on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()  # not getrusage: its peak includes the parent process's
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # KiB


class Intervals:
    """Where the loop's time goes between two rows: seconds of each of LAPS, on the host.

    On a GPU the host only launches work: its time shows up where the host next waits.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(LAPS, 0.0)
        self.images = 0
        self._began = self._lap = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`, one of LAPS."""
        now = time.perf_counter()
        self.seconds[name] += now - self._lap
        self._lap = now

    def skip(self) -> None:
        """Leave the time since the last lap out of the sums and of the interval."""
        now = time.perf_counter()
        self._began += now - self._lap
        self._lap = now

    def take(self) -> dict[str, float]:
        """Return and reset the sums, the interval, images/s and the fraction of time spent waiting, in [0, 1]."""
        now = time.perf_counter()
        interval_s = now - self._began
        row = {
            "images_per_s": self.images / interval_s,
            "interval_s": interval_s,
            **self.seconds,
            "loader_wait_share": min(self.seconds["loader_wait_s"] / interval_s, 1.0),
        }
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.images, self._began, self._lap = 0, now, now
        return row


class Sink(Protocol):
    """A further destination of rows, beside metrics.jsonl; neither method may raise."""

    def write(self, row: dict[str, Any]) -> None:
        """Write one row."""

    def close(self) -> None:
        """Write what is still held, and close."""


class _TensorBoard:
    def __init__(self, events: EventFile) -> None:
        self._events = events

    def write(self, row: dict[str, Any]) -> None:
        self._events.write(row["step"], scalars(row))

    def close(self) -> None:
        self._events.close()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by their TensorBoard tags: learning/loss, machine/images_per_s."""
    return {
        f"{'learning' if name in LEARNING else 'machine'}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


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
            self._sinks.append(_TensorBoard(EventFile(tensorboard, first_step=from_step + 1, warn=self.warn)))
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
        for sink in self._sinks:
            sink.write(row)
        text = describe(row, left_s=left_s)
        if not self._bar.disable:
            self._bar.n = min(row["progress"], 1.0)
            self._bar.set_description_str(text)
        elif row["elapsed_s"] >= self._next_line_s or row["progress"] == 1.0:
            print(f"{100 * row['progress']:3.0f}%  {text}", file=sys.stderr, flush=True)
            self._next_line_s = row["elapsed_s"] + LINE_EVERY_S

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
