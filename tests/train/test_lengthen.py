"""Laws of runs made longer: schedules of the longer run, a second warm-up, the same bits after kills."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastbyol import train
from fastbyol.cli import eval as evaluation
from fastbyol.cli.train import main
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import named
from fastbyol.schedule import Rejoin, build
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import Fork, wait_until
from tests.support.runs import arguments, encoders_are_equal, learned

LENGTHS = (2, 3, 4)  # epochs, of five steps each
BUDGET_S = 12.0  # rehearsal and calibration on a busy machine leave some of it


def rows_of(out: Path) -> list[dict[str, Any]]:
    return read_metrics(RunFolder(out).metrics)


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(RunFolder(out).result.read_text())
    return result


@pytest.fixture(scope="module")
def lengthened(betons: Betons, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start a run from weights, and make it longer twice, without interruption."""
    out = tmp_path_factory.mktemp("lengthened") / "run"
    for epochs in LENGTHS:
        assert main([*arguments(betons, out, *settings(betons, finished, epochs)), "--resume"]) == 0
    return out


def settings(betons: Betons, weights: Path, epochs: int) -> list[str]:
    return [f"--val={betons.val}", f"--init={weights}", f"--epochs={epochs}", "--warmup-epochs=1", "--knn-at=0.7"]


@pytest.mark.slow
def test_a_killed_run_from_weights_lengthened_twice_is_bit_equal(
    betons: Betons, finished: Path, lengthened: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for epochs in LENGTHS:
        asked = [*arguments(betons, out, *settings(betons, finished, epochs)), "--resume"]
        process = Fork(tmp_path / f"said-{epochs}", *asked, "--checkpoint-every=0.01s")
        wait_until(lambda last=5 * epochs - 3: len(rows_of(out)) >= last, process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not RunFolder(out).result.exists()
        assert main(asked) == 0
    assert encoders_are_equal(lengthened, out)
    assert learned(out) == learned(lengthened)
    assert result_of(out)["lengthened"] == result_of(lengthened)["lengthened"]


def test_a_longer_run_goes_on_by_the_schedules_of_its_length(lengthened: Path) -> None:
    rows, result, config = rows_of(lengthened), result_of(lengthened), RunFolder(lengthened).read_config()
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert config.epochs == 4
    first, second = result["lengthened"]
    assert first == {"step": 10, "epochs_before": 2, "epochs": 3, "progress": 10 / 15, "lr": 0.0}
    assert (second["step"], second["epochs_before"], second["epochs"], second["progress"]) == (15, 3, 4, 0.75)
    longest = build(config.recipe, epochs=4)
    for row in rows[15:]:
        assert row["progress"] == row["step"] / 20
        assert row["tau"] == longest.tau(row["progress"])
        expected = longest.learning_rate(row["progress"])
        is_warming_up = row["progress"] < 0.75 + longest.warmup * 0.25
        assert row["lr"] < expected if is_warming_up else row["lr"] == expected
    assert rows[9]["lr"] == rows[14]["lr"] == rows[19]["lr"] == 0
    assert [row["step"] for row in rows if "warnings" in row] == [11, 16]
    assert "made longer at step 15, from 3 to 4 epochs: that step is 75.0% of the longer run" in rows[15]["warnings"][0]
    assert rows[15]["warnings"][0] in RunFolder(lengthened).report.read_text()


def test_scores_that_lie_ahead_again_are_taken_again(lengthened: Path) -> None:
    assert [row["step"] for row in rows_of(lengthened) if "score_s" in row] == [7, 11]  # 70 % of 2 and of 3 epochs


def test_what_a_run_had_reached_is_kept_as_a_run(
    betons: Betons, lengthened: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = RunFolder(lengthened).earlier / "step-000000010"
    assert result_of(kept)["steps"] == 10
    assert RunFolder(kept).read_config().epochs == 2
    asked = ["knn", str(kept), f"--train={betons.train}", f"--val={betons.val}", "--json"]
    assert evaluation.main(asked) == 0
    assert json.loads(capsys.readouterr().out)["trained"]["top1"] == pytest.approx(result_of(kept)["knn_top1"])


def test_a_run_cannot_become_shorter_or_change_the_kind_of_its_length(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    asked = [*arguments(betons, out, f"--val={betons.val}", "--warmup-epochs=1"), "--resume"]
    assert main([*asked, "--epochs=2"]) == 2
    assert "epochs was 3, is 2, and a run can only become longer" in capsys.readouterr().err
    assert main([*asked, "--budget=1h"]) == 2
    assert "the length was 3 epochs, is a budget" in capsys.readouterr().err
    assert result_of(out) == result_of(finished)


def test_a_run_without_a_checkpoint_cannot_become_longer(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(RunFolder(out).checkpoints)
    asked = arguments(betons, out, f"--val={betons.val}", "--warmup-epochs=1", "--resume", "--epochs=4")
    assert main(asked) == 2
    assert f"has no checkpoint any more to go on from; start another run from its weights: --init {out}" in (
        capsys.readouterr().err
    )
    assert result_of(out) == result_of(finished)


@pytest.mark.slow
@pytest.mark.alone
def test_a_finished_budget_goes_on_with_a_longer_one(finished: Path, tmp_path: Path) -> None:
    config = replace(RunFolder(finished).read_config(), epochs=None, budget_s=BUDGET_S, val=None)
    before = train.run(config, tmp_path)
    rows = rows_of(tmp_path)
    assert before is not None
    assert before["progress"] == 1.0
    assert train.run(config, tmp_path, resume=True) == before  # it has finished
    after = train.run(replace(config, budget_s=2 * BUDGET_S), tmp_path, resume=True)
    assert after is not None
    assert (after["progress"], after["budget_s"]) == (1.0, 2 * BUDGET_S)
    (note,) = after["lengthened"]
    assert (note["step"], note["budget_s_before"], note["budget_s"]) == (before["steps"], BUDGET_S, 2 * BUDGET_S)
    assert note["progress"] == 0.5
    more = rows_of(tmp_path)
    assert more[: len(rows)] == rows
    added = [row["progress"] for row in more[len(rows) :]]
    assert added == sorted(added)
    assert 0.5 <= added[0] < added[-1] == 1.0


def test_the_second_warm_up_is_a_line_from_the_old_rate_to_the_schedules() -> None:
    plain = build(named("demo"), epochs=200)
    rejoin = Rejoin(0.5, 0.01, 0.1)
    assert rejoin.learning_rate(0.5, plain.learning_rate(0.5)) == 0.01
    halfway = plain.learning_rate(0.55)
    assert rejoin.learning_rate(0.55, halfway) == pytest.approx((0.01 + halfway) / 2)
    for progress in (0.0, 0.49, 0.6, 0.9, 1.0):
        assert rejoin.learning_rate(progress, plain.learning_rate(progress)) == plain.learning_rate(progress)
    assert Rejoin(0.5, 0.01, 0.0).learning_rate(0.5, 0.3) == 0.3


def test_without_a_length_a_run_keeps_its_own(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    before = RunFolder(out).read_config()
    assert before.epochs != before.recipe.epochs
    assert main([*arguments(betons, out, f"--val={betons.val}", "--warmup-epochs=1", "--threads=1"), "--resume"]) == 0
    assert "has already finished" in capsys.readouterr().err
    assert RunFolder(out).read_config() == before
