"""Laws of fastbyol-eval: both encoders scored, JSON on request, one clear line for every wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastbyol.eval import main
from fastbyol.train import main as train
from tests.conftest import Betons


@pytest.fixture(scope="module")
def run(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one epoch and score it within the run."""
    out = tmp_path_factory.mktemp("eval") / "run"
    asked = [f"--data={betons.train}", f"--val={betons.val}", f"--out={out}", "--batch-size=32", "--device=cpu"]
    assert train(["demo", *asked, "--epochs=1", "--warmup-epochs=0"]) == 0
    return out


def files(betons: Betons) -> list[str]:
    return [f"--train={betons.train}", f"--val={betons.val}"]


def test_knn_repeats_the_scores_of_the_run(betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", str(run), *files(betons), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert scores["trained"]["top1"] == pytest.approx(result["knn_top1"])
    assert scores["random_init"]["top1"] == pytest.approx(result["knn_top1_random_init"])
    assert scores["trained"]["bank"] == 160


def test_linear_scores_both_encoders_in_a_sentence(
    betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["linear", str(run), *files(betons), "--epochs=2"]) == 0
    said = capsys.readouterr().out
    assert "linear top-1" in said
    assert "random init" in said
    assert "top-5" in said


def unfinished(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no run", "holds no run"),
        ("unfinished", "has not finished"),
        ("missing file", "none.beton"),
        ("unlabelled", "no labels"),
        ("k of zero", "from 1 to the 160"),
    ],
)
def test_bad_input_ends_with_one_clear_line_and_status_2(
    case: str, expected: str, betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = {"no run": tmp_path, "unfinished": unfinished(run, tmp_path)}.get(case, run)
    val = {"missing file": tmp_path / "none.beton", "unlabelled": betons.unlabelled}.get(case, betons.val)
    k = "0" if case == "k of zero" else "20"
    assert main(["knn", str(folder), f"--train={betons.train}", f"--val={val}", f"--k={k}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastbyol-eval: error: ")
    assert said.count("\n") == 1
    assert expected in said
