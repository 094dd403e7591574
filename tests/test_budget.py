"""Laws of the clock: durations read and refused, time since the process began, progress that ends at one."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fastbyol.budget import ClockPlan, StepPlan, Stopwatch, format_duration, parse_duration, process_age_s
from fastbyol.config import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), ("8h", 28_800), ("1d12h", 129_600), ("1h30m", 5400), ("1.5h", 5400), (" 2M ", 120)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["8 bananas", "", "8", "0s", "-5m", "5m1h", "h", "1e3s", "nan", "8hh", "∞"])
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="give days, hours, minutes, seconds"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m"), (95, "1m35s"), (3600, "1h"), (7260, "2h1m"), (129_600, "1d12h")]
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_stopwatch_counts_from_the_start_of_the_process() -> None:
    code = "import time; time.sleep(1); from fastbyol.budget import Stopwatch; print(Stopwatch().elapsed_s())"
    began = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1.0 <= told <= time.monotonic() - began + 0.05  # /proc counts in ticks of 10 ms


def test_stopwatch_adds_earlier_runs() -> None:
    assert Stopwatch(used_before_s=1000).elapsed_s() == pytest.approx(1000 + process_age_s(), abs=0.1)


def test_step_plan_ends_at_exactly_one() -> None:
    plan = StepPlan(7)
    assert plan.progress(0, elapsed_s=99) == 0
    assert plan.progress(7, elapsed_s=0) == 1.0
    assert not plan.is_over(6, elapsed_s=1e9, step_s=1e9)
    assert plan.is_over(7, elapsed_s=0, step_s=0)


def test_clock_plan_maps_its_window_to_progress() -> None:
    plan = ClockPlan(start_s=10, end_s=110)
    assert [plan.progress(0, elapsed_s=s) for s in (5, 10, 60, 110, 500)] == [0, 0, 0.5, 1, 1]
    assert not plan.is_over(0, elapsed_s=100, step_s=9)
    assert plan.is_over(0, elapsed_s=100, step_s=11)


def test_clock_plan_of_a_resumed_run_goes_on_where_it_stood() -> None:
    plan = ClockPlan(start_s=50, end_s=100, start_progress=0.4)
    assert plan.progress(0, elapsed_s=50) == 0.4
    assert plan.progress(0, elapsed_s=75) == pytest.approx(0.7)
    assert plan.progress(0, elapsed_s=100) == 1.0
