"""Know the clock: durations, deadlines and Slurm's time left as text, and the seconds a run has used."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from fastbyol.config import ConfigError

UNITS_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")  # of squeue: days-hours:minutes:seconds
SLURM_MARGIN_S = 15.0  # to be gone before Slurm ends the job itself
SQUEUE_TIMEOUT_S = 10.0


class Length(NamedTuple):
    """Say how long a run may take: `budget_s` seconds of its own over all its processes, or until a Unix time."""

    budget_s: float | None = None
    deadline: float | None = None


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


def parse_budget(text: str, environment: Mapping[str, str] = os.environ) -> Length:
    """Read --budget: a duration, "until 2026-12-01T08:00" (local time, or with an offset), or "slurm".

    Raises ConfigError for anything else and for "slurm" outside a Slurm job. A moment may have passed: a run that has
    trained is then only closed.
    """
    word, _, rest = text.strip().partition(" ")
    if word == "until":
        return Length(deadline=_moment(rest.strip()))
    if word == "slurm" and not rest:
        return Length(deadline=_end_of_slurm_job(environment) - SLURM_MARGIN_S)
    try:
        return Length(budget_s=parse_duration(text))
    except ConfigError as error:
        raise ConfigError(f"{error}; or 'until 2026-12-01T08:00', or slurm") from None


def _moment(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(f"--budget until {text!r} is not a date and time; give one as 2026-12-01T08:00") from None


def _end_of_slurm_job(environment: Mapping[str, str]) -> float:
    """Give the Unix time at which Slurm ends this job: from its environment, else from squeue."""
    if "SLURM_JOB_ID" not in environment:
        raise ConfigError(
            "--budget slurm, but this is no Slurm job (SLURM_JOB_ID is not set); give a duration such as 8h"
        )
    if "SLURM_JOB_END_TIME" in environment:
        return float(environment["SLURM_JOB_END_TIME"])
    command = ["squeue", "--noheader", "--jobs", environment["SLURM_JOB_ID"], "--format", "%L"]
    try:
        asked = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"--budget slurm: {' '.join(command)} failed ({error}); give a duration such as 8h"
        ) from error
    match = TIME_LEFT.fullmatch(asked.stdout.strip())
    if match is None:
        raise ConfigError(
            f"--budget slurm: the job has time limit {asked.stdout.strip()!r}; give a duration such as 8h"
        )
    left = sum(int(part) * unit for part, unit in zip(match.groups("0"), UNITS_S.values(), strict=True))
    return time.time() + left


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
    return _now_s() - started_ticks / os.sysconf("SC_CLK_TCK")


def _now_s() -> float:
    """Read a clock that no one sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Stopwatch:
    """Count the seconds of a run: this process's, plus what earlier processes of the same run used.

    `age_s` is what this process has used already: its whole age on a command line, nothing inside a program that has
    lived for other ends.
    """

    def __init__(self, *, age_s: float) -> None:
        self._origin = _now_s() - age_s

    def elapsed_s(self) -> float:
        """Give the seconds the run has used so far."""
        return _now_s() - self._origin

    def add(self, used_before_s: float) -> None:
        """Count what earlier processes of the run used."""
        self._origin -= used_before_s

    def at(self, moment: float) -> float:
        """Give what the stopwatch will show at a Unix time."""
        return self.elapsed_s() + moment - time.time()
