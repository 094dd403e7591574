"""Time budgets: durations, deadlines and Slurm's time limit read from text, and the stopwatch of a run."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from fastbyol.errors import ConfigError

UNITS_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")  # of squeue: days-hours:minutes:seconds
SLURM_MARGIN_S = 15.0  # to exit before Slurm ends the job
SQUEUE_TIMEOUT_S = 10.0


class Length(NamedTuple):
    """The time a run may take: `budget_s` seconds over all its processes, or until a Unix time, `deadline`."""

    budget_s: float | None = None
    deadline: float | None = None


def parse_duration(text: str, *, flag: str = "--budget") -> float:
    """Convert a duration such as 90s, 5m, 8h or 1d12h to seconds; raise ConfigError unless it is above 0."""
    match = DURATION.fullmatch(text.strip().lower())
    parts = match.groups() if match else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, UNITS_S.values(), strict=False) if part)
    if seconds <= 0:
        raise ConfigError(
            f"{flag} {text!r} is not a duration; give days, hours, minutes and seconds, such as 90s, 8h or 1d12h"
        )
    return seconds


def parse_budget(text: str, environment: Mapping[str, str] = os.environ) -> Length:
    """Parse --budget: a duration, "until 2026-12-01T08:00" (local time, or with an offset), or "slurm".

    Raises ConfigError for anything else, and for "slurm" outside a Slurm job. The deadline may lie in the past: a run
    that has already trained then only does its closing work.
    """
    word, _, rest = text.strip().partition(" ")
    if word == "until":
        return Length(deadline=_unix_time(rest.strip()))
    if word == "slurm" and not rest:
        return Length(deadline=_end_of_slurm_job(environment) - SLURM_MARGIN_S)
    try:
        return Length(budget_s=parse_duration(text))
    except ConfigError as error:
        raise ConfigError(f"{error}; or 'until 2026-12-01T08:00', or slurm") from None


def check_budget(text: str) -> None:
    """Raise ConfigError for a text that parse_budget never takes; Slurm is not asked, which may take a process."""
    if text.strip() != "slurm":
        parse_budget(text)


def _unix_time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(f"--budget until {text!r} is not a date and time; give one as 2026-12-01T08:00") from None


def _end_of_slurm_job(environment: Mapping[str, str]) -> float:
    """Return the Unix time at which Slurm ends this job, from its environment or else from squeue."""
    if "SLURM_JOB_ID" not in environment:
        raise ConfigError("--budget slurm outside a Slurm job (SLURM_JOB_ID is not set); give a duration such as 8h")
    if "SLURM_JOB_END_TIME" in environment:
        return float(environment["SLURM_JOB_END_TIME"])
    command = ["squeue", "--noheader", "--jobs", environment["SLURM_JOB_ID"], "--format", "%L"]
    try:
        squeue = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"--budget slurm: {' '.join(command)} failed ({error}); give a duration such as 8h"
        ) from error
    match = TIME_LEFT.fullmatch(squeue.stdout.strip())
    if match is None:
        raise ConfigError(
            f"--budget slurm: the job has time limit {squeue.stdout.strip()!r}; give a duration such as 8h"
        )
    left = sum(int(part) * unit for part, unit in zip(match.groups("0"), UNITS_S.values(), strict=True))
    return time.time() + left


def format_duration(seconds: float) -> str:
    """Format seconds in the two largest units that are not 0: 95 -> '1m35s'."""
    left = round(seconds)
    parts = []
    for name, unit in UNITS_S.items():
        amount, left = divmod(left, unit)
        if amount:
            parts.append(f"{amount}{name}")
    return "".join(parts[:2]) or "0s"


def process_age_s() -> float:
    """Return the seconds since this process started, interpreter start and imports included (Linux: /proc)."""
    stat = Path("/proc/self/stat").read_text()
    started_ticks = int(stat.rpartition(")")[2].split()[19])
    return _now_s() - started_ticks / os.sysconf("SC_CLK_TCK")


def _now_s() -> float:
    """Read a monotonic clock that also runs while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Stopwatch:
    """The seconds a run has used: those of this process plus those of its earlier processes.

    `age_s`: seconds this process has used already; process_age_s() on a command line, 0 inside another program.
    """

    def __init__(self, *, age_s: float) -> None:
        self._origin = _now_s() - age_s

    def elapsed_s(self) -> float:
        """Return the seconds the run has used so far."""
        return _now_s() - self._origin

    def add_earlier(self, used_before_s: float) -> None:
        """Add the seconds that earlier processes of the run used."""
        self._origin -= used_before_s

    def elapsed_at(self, unix_time: float) -> float:
        """Return the seconds the run will have used at a Unix time."""
        return self.elapsed_s() + unix_time - time.time()


class TimeLimit:
    """Called before each piece of work, tells whether that piece, if as long as the last, would end too late.

    until_s: the latest end in seconds of the run; the first piece is taken to be as long as the time before it.
    """

    def __init__(self, stopwatch: Stopwatch, until_s: float) -> None:
        self._stopwatch, self._until_s = stopwatch, until_s
        self._last_s = stopwatch.elapsed_s()
        self.was_reached = False

    def __call__(self) -> bool:
        now_s = self._stopwatch.elapsed_s()
        self.was_reached = 2 * now_s - self._last_s > self._until_s
        self._last_s = now_s
        return self.was_reached
