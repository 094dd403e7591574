"""Know what a run tells while it runs: metrics.jsonl, a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fastbyol import atomic
from fastbyol.budget import format_duration
from fastbyol.config import ConfigError

LINE_EVERY_S = 30.0  # without a terminal


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every whole row of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ConfigError(f"{path} holds a line that is not JSON ({error}); remove that line") from error


class Intervals:
    """Add up where the loop's time goes between two rows: seconds waiting for data, making views, stepping, logging.

    Host time: on a GPU, work that is only launched shows where the host next waits for it.
    """

    def __init__(self) -> None:
        self.seconds = {"loader_wait_s": 0.0, "views_s": 0.0, "step_s": 0.0, "log_s": 0.0, "checkpoint_s": 0.0}
        self.images = 0
        self._began = self._lap = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self._lap
        self._lap = now

    def take(self) -> dict[str, float]:
        """Return the sums, the whole interval and images per second since the last call, and begin anew."""
        now = time.perf_counter()
        interval_s = now - self._began
        row = {"images_per_s": self.images / interval_s, "interval_s": interval_s, **self.seconds}
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.images, self._began, self._lap = 0, now, now
        return row


class Telemetry:
    """Write the rows of one run and show its progress; a context manager.

    On resume, rows of steps after `from_step` are dropped first: those steps are taken again.
    """

    def __init__(self, path: Path, *, from_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= from_step]
        atomic.write(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {desc}", disable=None, file=sys.stderr)
        self._next_line_s = 0.0

    def row(self, row: dict[str, Any], *, left_s: float) -> None:
        """Append one row and show it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        text = (
            f"step {row['step']}  epoch {row['epoch']:.2f}  loss {row['loss']:.3f}  "
            f"{row['images_per_s']:.0f} images/s  {format_duration(left_s)} left"
        )
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
        self._file.close()
