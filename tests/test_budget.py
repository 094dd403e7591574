"""Laws of the clock: durations read and refused, time since the process began, progress that ends at one."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from fastbyol.budget import SLURM_MARGIN_S, Stopwatch, format_duration, parse_budget, parse_duration
from fastbyol.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), ("8h", 28_800), ("1d12h", 129_600), ("1h30m", 5400), ("1.5h", 5400), (" 2M ", 120)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["8 bananas", "", "8", "0s", "-5m", "5m1h", "h", "1e3s", "nan", "8hh", "∞"])
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="give days, hours, minutes and seconds"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m"), (95, "1m35s"), (3600, "1h"), (7260, "2h1m"), (129_600, "1d12h")]
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_stopwatch_counts_from_the_start_of_the_process() -> None:
    code = "import time; time.sleep(1); from fastbyol.budget import *; print(process_age_s())"
    began = time.monotonic()
    age_s = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1.0 <= age_s <= time.monotonic() - began + 0.05  # /proc counts in ticks of 10 ms


def test_stopwatch_adds_earlier_runs() -> None:
    stopwatch = Stopwatch(age_s=5)
    stopwatch.add_earlier(1000)
    assert stopwatch.elapsed_s() == pytest.approx(1005, abs=0.1)
    assert stopwatch.elapsed_at(time.time() + 50) == pytest.approx(1055, abs=0.1)


def test_a_budget_may_be_a_duration_or_a_moment() -> None:
    assert parse_budget("1h30m") == (5400, None)
    moment = datetime.now().replace(microsecond=0) + timedelta(hours=5)
    assert parse_budget(f"until {moment.isoformat()}") == (None, moment.timestamp())
    budget = parse_budget("until 2999-01-01T00:00+00:00")
    assert budget.deadline == datetime(2999, 1, 1, tzinfo=timezone.utc).timestamp()


@pytest.mark.parametrize("text", ["until", "until tomorrow", "slurm 5", "8 bananas", "slurm"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        parse_budget(text, {})


def squeue(folder: Path, says: str) -> dict[str, str]:
    """Make a squeue that gives this answer, and the environment of a job."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    return {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("says", "seconds"), [("1-02:03:04", 93_784), ("2:03:04", 7384), ("59:30", 3570)], ids=["days", "hours", "minutes"]
)
def test_a_slurm_budget_is_what_the_job_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, seconds: float
) -> None:
    job = squeue(tmp_path, says)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    left_s = parse_budget("slurm", job).deadline - time.time()
    assert left_s == pytest.approx(seconds - SLURM_MARGIN_S, abs=2)
    budget = parse_budget("slurm", {**job, "SLURM_JOB_END_TIME": "5000000000"})
    assert budget.deadline == 5_000_000_000 - SLURM_MARGIN_S


def test_a_slurm_job_without_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = squeue(tmp_path, "UNLIMITED")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ConfigError, match="UNLIMITED"):
        parse_budget("slurm", job)
