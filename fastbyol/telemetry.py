"""Know what a run tells while it runs: metrics.jsonl, TensorBoard, W&B, a progress bar or a line now and then."""

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

LAPS = ("loader_wait_s", "views_s", "step_s", "agree_s", "log_s", "checkpoint_s")  # of the loop's time
LINE_EVERY_S = 30.0  # without a terminal
LEARNING = (
    "loss",
    "lr",
    "tau",
    "embedding_std",
    "crop_px",
    "knn_top1",
)  # TensorBoard's first group; the rest is the machine's


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every whole row of a metrics.jsonl; a last line cut short by a kill is left out."""
    return [row for row, _ in _rows_and_ends(path)]


def _rows_and_ends(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Pair every whole row with the offset of its end in the file."""
    if not path.exists():
        return []
    found, end = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        end += len(line) + 1
        try:
            found.append((json.loads(line), end))
        except ValueError as error:
            raise ConfigError(f"{path} holds a line that is not JSON ({error}); remove that line") from error
    return found


def peak_gib(device: str) -> float:
    """Measure the most memory this process has held, GiB: of the GPU as torch counts it, or resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()  # not getrusage, whose peak is also that of whoever began us
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # KiB


class Intervals:
    """Add up where the loop's time goes between two rows, in seconds of each of LAPS.

    Host time: on a GPU, work that is only launched shows where the host next waits for it.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(LAPS, 0.0)
        self.images = 0
        self._began = self._lap = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self._lap
        self._lap = now

    def skip(self) -> None:
        """Leave the time since the last lap out: of the sums, and of the interval."""
        now = time.perf_counter()
        self._began += now - self._lap
        self._lap = now

    def take(self) -> dict[str, float]:
        """Return the sums, the whole interval, images/s and the share of waiting in [0, 1] since the last call."""
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
    """Take the rows of a run beside metrics.jsonl; neither call may raise."""

    def write(self, row: dict[str, Any]) -> None:
        """Take one row."""

    def close(self) -> None:
        """Take no more."""


class _TensorBoard:
    def __init__(self, events: EventFile) -> None:
        self._events = events

    def write(self, row: dict[str, Any]) -> None:
        self._events.write(row["step"], scalars(row))

    def close(self) -> None:
        self._events.close()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Name the numbers of a row as TensorBoard's tags: learning/loss, machine/images_per_s."""
    return {
        f"{'learning' if name in LEARNING else 'machine'}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


class Telemetry:
    """Write the rows of one run and show its progress; a context manager, on the one process that writes.

    path: metrics.jsonl; rows of steps after `from_step` are dropped first: those steps are taken again. tensorboard:
    the folder of event files, None for none. extra_sink: a further sink, closed with this one. pending_warnings: warnings
    that no row holds yet, those from before and, when all is closed, those that came after the last row. Raises OSError where a
    file cannot be opened; a disk that fills up later costs warnings, not the run.
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
        kept = [end for row, end in _rows_and_ends(path) if row["step"] <= from_step]
        self._rows = RecordFile(path, warn=self.warn, keep_bytes=max(kept, default=0))
        self._sinks: list[Sink] = [] if extra_sink is None else [extra_sink]
        if tensorboard is not None:
            self._sinks.append(_TensorBoard(EventFile(tensorboard, first_step=from_step + 1, warn=self.warn)))
        self._bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {desc}", disable=None, file=sys.stderr)
        self._next_line_s = -math.inf

    def warn(self, text: str) -> None:
        """Say something at once, in one line, and keep it in the next row (`warnings`) for the report."""
        tqdm.write(f"warning: {text}", file=sys.stderr)
        self._pending_warnings.append(text)

    def write_row(self, row: dict[str, Any], *, left_s: float) -> None:
        """Append one row and show it."""
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
    """Say in one line how a run stands; what the row does not hold is left out."""
    parts = [f"step {row['step']}", f"epoch {row['epoch']:.2f}", f"loss {row['loss']:.3f}"]
    parts.append(f"{row['images_per_s']:.0f} images/s")
    if "loader_wait_share" in row:
        parts.append(f"{100 * row['loader_wait_share']:.0f} % waiting")
    if "mfu" in row:
        parts.append(f"{100 * row['mfu']:.0f} % MFU")
    if "peak_gib" in row:
        parts.append(f"{row['peak_gib']:.1f} GiB")
    return "  ".join((*parts, f"{format_duration(left_s)} left"))
