"""Laws of --profile: ten steps after a warm-up of ten, and never the end of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastbyol.monitor.profiler import STEPS, WARM_UP, Profile
from tests.support.full_disk import files_end_at


def work(profile: Profile, steps: int) -> None:
    """Take steps that multiply matrices."""
    matrix = torch.ones(64, 64)
    with profile:
        for _ in range(steps):
            matrix = matrix @ matrix / 64
            profile.step()


@pytest.mark.parametrize("steps", [WARM_UP + STEPS, WARM_UP + STEPS + 7])
def test_ten_steps_are_traced(tmp_path: Path, steps: int) -> None:
    work(Profile(tmp_path / "profile", device="cpu", warn=pytest.fail), steps)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert sum(event["name"] == "aten::mm" for event in trace["traceEvents"] if "name" in event) == STEPS
    table = (tmp_path / "profile" / "operations.txt").read_text()
    assert "aten::mm" in table
    assert "10 steps" in table.splitlines()[0]


@pytest.mark.parametrize("steps", [0, WARM_UP - 1, WARM_UP + 3])
def test_a_run_too_short_to_profile_says_so(tmp_path: Path, steps: int) -> None:
    said: list[str] = []
    work(Profile(tmp_path / "profile", device="cpu", warn=said.append), steps)
    assert len(said) == 1
    assert f"the run took {steps} of the 20 steps" in said[0]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("limit", [1000, 4000])  # of a trace of some 30 kB
def test_a_full_disk_costs_the_profile_and_not_the_run(tmp_path: Path, limit: int) -> None:
    said: list[str] = []
    with files_end_at(limit):
        work(Profile(tmp_path / "profile", device="cpu", warn=said.append), WARM_UP + STEPS)
    assert len(said) == 1
    assert "could not be written" in said[0]
    assert not list((tmp_path / "profile").iterdir())
