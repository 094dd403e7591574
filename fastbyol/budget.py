"""Know the clock: durations as text, time since the process began, and progress in [0, 1] towards the end of a run."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from fastbyol.config import ConfigError

UNITS_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: str, *, flag: str = "--budget") -> float:
    """Read a duration such as 90s, 5m, 8h or 1d12h into seconds, more than 0; ConfigError names the flag otherwise."""
    match = DURATION.fullmatch(text.strip().lower())
    parts = match.groups() if match else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, UNITS_S.values(), strict=False) if part)
    if seconds <= 0:
        raise ConfigError(
            f"{flag} {text!r} is not a duration; give days, hours, minutes, seconds such as 90s, 8h or 1d12h"
        )
    return seconds


def format_duration(seconds: float) -> str:
    """Write seconds as the two largest units that matter: 95 -> '1m35s'."""
    left = round(seconds)
    parts = []
    for name, unit in UNITS_S.items():
        amount, left = divmod(left, unit)
        if amount:
            parts.append(f"{amount}{name}")
    return "".join(parts[:2]) or "0s"


def process_age_s() -> float:
    """Measure seconds since this process was started, interpreter start and imports included (Linux: /proc)."""
    stat = Path("/proc/self/stat").read_text()
    started_ticks = int(stat.rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


class Stopwatch:
    """Count the seconds of a run: this process since its start, plus what earlier processes of the same run used."""

    def __init__(self, *, used_before_s: float = 0.0) -> None:
        self._origin = time.monotonic() - process_age_s() - used_before_s

    def elapsed_s(self) -> float:
        """Give the seconds the run has used so far."""
        return time.monotonic() - self._origin


@dataclass(frozen=True)
class StepPlan:
    """Let steps drive progress: step of `total_steps`."""

    total_steps: int

    def progress(self, step: int, *, elapsed_s: float) -> float:  # noqa: ARG002 - the clock plays no part
        """Give step / total_steps."""
        return min(step / self.total_steps, 1.0)

    def is_over(self, step: int, *, elapsed_s: float, step_s: float) -> bool:  # noqa: ARG002
        """Tell whether every step is done."""
        return step >= self.total_steps


@dataclass(frozen=True)
class ClockPlan:
    """Let the clock drive progress: from `start_progress` at `start_s` to 1 at `end_s`, all in seconds of the run.

    `end_s` is the deadline less the reserve for the final evaluation, export and report. A resumed run starts at the
    progress of its checkpoint, so that the schedules go on where they stood and still end on time.
    """

    start_s: float
    end_s: float
    start_progress: float = 0.0

    def progress(self, step: int, *, elapsed_s: float) -> float:  # noqa: ARG002 - steps play no part
        """Interpolate between the start and the end of training time."""
        if elapsed_s >= self.end_s:
            return 1.0
        share = max(elapsed_s - self.start_s, 0.0) / (self.end_s - self.start_s)
        return self.start_progress + (1 - self.start_progress) * share

    def is_over(self, step: int, *, elapsed_s: float, step_s: float) -> bool:  # noqa: ARG002
        """Tell whether another step of `step_s` seconds would end after the end."""
        return elapsed_s + step_s > self.end_s
