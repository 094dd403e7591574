"""Live metrics of a run: metrics.jsonl, TensorBoard, W&B, and a progress bar or a line every 30 s."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastbyol.errors import ConfigError
from fastbyol.system.device import Idle

LAPS = ("loader_wait_s", "views_s", "step_s", "agree_s", "log_s", "checkpoint_s")  # of the loop, in a row


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


def extend_last_row(path: Path, entries: Mapping[str, float]) -> int | None:
    """Add entries to the last row of a metrics.jsonl in one write over it; return its step, None without rows.

    Raises OSError where the disk refuses; the row is then as before.
    """
    rows = _rows_and_ends(path)
    if not rows:
        return None
    (row, _), begin = rows[-1], (rows[-2][1] if len(rows) > 1 else 0)
    step: int = row["step"]
    with path.open("r+b", buffering=0) as file:
        file.seek(begin)
        before, after = file.read(), json.dumps({**row, **entries}).encode() + b"\n"
        try:
            if os.pwrite(file.fileno(), after, begin) < len(after):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.pwrite(file.fileno(), before, begin)  # needs no room
            file.truncate(begin + len(before))
            raise
        file.truncate(begin + len(after))
    return step


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
        self._cpu_began = self._cpu_lap = time.process_time()

    def lap(self, name: str) -> float:
        """Add the time since the last lap to `name`, one of LAPS; return it, in seconds."""
        now = time.perf_counter()
        took_s, self._lap, self._cpu_lap = now - self._lap, now, time.process_time()
        self.seconds[name] += took_s
        return took_s

    def skip(self) -> None:
        """Leave the time since the last lap out of the sums and of the interval."""
        now, cpu = time.perf_counter(), time.process_time()
        self._began += now - self._lap
        self._cpu_began += cpu - self._cpu_lap
        self._lap, self._cpu_lap = now, cpu

    def take(self, *, gpu_idle: Idle | None = None) -> dict[str, float]:
        """Return and reset the sums, the interval, images/s and the fraction of time lost waiting, in [0, 1].

        cpu_s: CPU-seconds of the interval, of all threads of this process. gpu_idle: what a GPU idled between steps,
        None without one. While it computes, the host's waiting loses nothing.
        """
        now, cpu = time.perf_counter(), time.process_time()
        interval_s = now - self._began
        row = {"images_per_s": self.images / interval_s, "interval_s": interval_s, "cpu_s": cpu - self._cpu_began}
        row |= self.seconds
        lost_s = self.seconds["loader_wait_s"]
        if gpu_idle is not None:
            lost_s = gpu_idle.waiting_s
            row["gpu_idle_share"] = min(gpu_idle.idle_s / interval_s, 1.0)
        row["loader_wait_share"] = min(lost_s / interval_s, 1.0)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.images, self._began, self._lap = 0, now, now
        self._cpu_began = self._cpu_lap = cpu
        return row
