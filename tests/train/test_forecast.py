"""Laws of --plan: it says what a run would be, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fastbyol.cli.train import main
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import Fork
from tests.support.runs import arguments

NAMES = ["length", "speed", "batch", "memory", "rates", "views", "disk", "reserve", "kNN now"]


def planned(said: str) -> dict[str, str]:
    """Read a plan's lines by name."""
    lines = said.partition("nothing was trained:\n")[2].splitlines()
    return dict(re.split(" {2,}", line.strip(), maxsplit=1) for line in lines)


@pytest.mark.parametrize("length", ["--budget=1h", "--epochs=3"])
def test_a_plan_says_all_that_would_happen_and_trains_nothing(length: str, betons: Betons, tmp_path: Path) -> None:
    asked = [f"--val={betons.val}", "--warmup-epochs=1", "--crop-ramp=16", "--threads=1", length, "--plan"]
    process = Fork(tmp_path / "said", *arguments(betons, tmp_path / "run", *asked), COLUMNS="400")
    _, said = process.communicate()  # a budget counts from the start of a process
    assert process.returncode == 0, said
    lines = planned(said)
    assert list(lines) == NAMES
    assert lines["batch"] == "32 images"
    assert "16, 20 px up to 60% of the run, then 24 px" in lines["views"]
    assert "160 images" in lines["length"]
    if length == "--epochs=3":
        assert "3 epochs of 160 images, 15 steps" in lines["length"]
        assert "warm-up 33.3% of the run" in lines["rates"]
    else:
        assert lines["length"].endswith("in 1h")
        assert "s of the budget: " in lines["reserve"]
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_a_plan_leaves_a_run_as_it_is(
    betons: Betons, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    before = {path: path.stat().st_mtime_ns for path in RunFolder(finished).path.rglob("*")}
    asked = [f"--val={betons.val}", "--warmup-epochs=1", "--epochs=3"]
    assert main(arguments(betons, finished, *asked, "--resume", "--plan")) == 0
    assert "the run has finished" in planned(capsys.readouterr().out)["length"]
    assert main(arguments(betons, finished, *asked, "--overwrite", "--plan", "--threads=1")) == 0
    assert list(planned(capsys.readouterr().out)) == NAMES
    assert {path: path.stat().st_mtime_ns for path in RunFolder(finished).path.rglob("*")} == before
    assert main(arguments(betons, finished, *asked, "--plan")) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["--budget=1h", "--epochs=3"])
def test_a_plan_names_no_rate_of_a_target_that_does_not_move(length: str, betons: Betons, tmp_path: Path) -> None:
    words = arguments(betons, tmp_path / "run", "--threads=1", length, "--plan")[1:]
    process = Fork(tmp_path / "said", "demo+target=online+beta=1+predictor_depth=0", *words, COLUMNS="400")
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert planned(said)["rates"].startswith("learning rate up to")
    assert "tau" not in said


def test_a_plan_leaves_damaged_checkpoints_to_the_run_that_goes_on(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    folder.result.unlink()  # as if it had been stopped
    (folder.checkpoints / "step-000000018.pt").write_bytes(b"cut short")
    asked = arguments(betons, folder.path, f"--val={betons.val}", "--warmup-epochs=1", "--epochs=4", "--resume")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert main([*asked, "--plan", "--threads=1"]) == 0
    assert "step-000000018.pt does not load" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    assert main(asked) == 0
    assert {path.name for path in folder.checkpoints.iterdir()} == {"step-000000015.pt", "step-000000020.pt"}
    state, damaged = checkpoint.load_newest(folder.checkpoints)
    assert (state["step"], damaged) == (20, [])
