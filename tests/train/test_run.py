"""Laws of fastbyol-train: a whole run folder, rows that add up, the same encoder from the same seed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastbyol.cli import eval as eval_command
from fastbyol.cli.closing_line import closing_line
from fastbyol.cli.train import main
from fastbyol.monitor.metrics import LAPS, read_metrics
from fastbyol.storage.run_folder import RunFolder, lock
from tests.conftest import Betons
from tests.monitor.test_tensorboard import read as read_events
from tests.support.runs import arguments, encoders_are_equal


def test_a_run_leaves_its_whole_folder(finished: Path) -> None:
    folder = RunFolder(finished)
    result = json.loads(folder.result.read_text())
    assert result["steps"] == 15
    assert result["images"] == 480
    assert result["epochs"] == 3.0
    assert 0 <= result["knn_top1"] <= 100
    assert 0 <= result["knn_top1_random_init"] <= 100
    assert 0 <= result["knn_top1_raw_pixels"] <= 100
    assert 0 <= result["probe_top1"] <= 100
    assert result["images_per_s"] > 0
    assert folder.encoder.is_file()
    assert folder.read_config().epochs == 3.0
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000000015.pt"]


def test_the_last_row_stands_at_progress_one_rate_zero_tau_one(finished: Path) -> None:
    rows = read_metrics(RunFolder(finished).metrics)
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert (rows[-1]["progress"], rows[-1]["lr"], rows[-1]["tau"]) == (1.0, 0.0, 1.0)
    assert rows[4]["lr"] == max(row["lr"] for row in rows)  # one epoch of warm-up is five steps


def test_rows_tell_the_online_probe_of_a_labelled_file(betons: Betons, finished: Path, tmp_path: Path) -> None:
    for row in read_metrics(RunFolder(finished).metrics):
        assert row["probe_loss"] > 0
        assert 0 <= row["probe_top1"] <= 100
    asked = ["demo", f"--data={betons.unlabelled}", f"--out={tmp_path / 'run'}", "--batch-size=32", "--device=cpu"]
    assert main([*asked, "--epochs=1", "--warmup-epochs=0"]) == 0
    assert "probe_loss" not in read_metrics(RunFolder(tmp_path / "run").metrics)[-1]


def test_rows_account_for_the_time_of_the_loop(finished: Path) -> None:
    for row in read_metrics(RunFolder(finished).metrics):
        parts = sum(row[name] for name in LAPS)
        assert 0.5 * row["interval_s"] < parts <= row["interval_s"]


def test_the_documentation_names_every_column_of_the_rows(finished: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    named = {
        name for cell in re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named >= {name for row in read_metrics(RunFolder(finished).metrics) for name in row}


def test_tensorboard_has_the_scores_before_and_after_training(finished: Path) -> None:
    result = json.loads(RunFolder(finished).result.read_text())
    shown = dict(read_events(RunFolder(finished).tensorboard)["scores/knn_top1"])
    assert shown == pytest.approx({0: result["knn_top1_random_init"], 15: result["knn_top1"]})


def test_the_last_line_tells_scores_report_and_the_next_command(finished: Path) -> None:
    said = closing_line(RunFolder(finished))
    assert re.match(r"kNN [\d.]+ % \(random init [\d.]+ %, raw pixels [\d.]+ %\); online probe [\d.]+ %; ", said)
    assert f"report: {finished}/report.html" in said
    words = shlex.split(said.partition("next: fastbyol-eval ")[2])
    args, _ = eval_command.parse(words)
    assert (args.protocol, args.encoder) == ("linear", str(finished))


def test_the_report_is_one_page_that_needs_nothing(finished: Path) -> None:
    page = RunFolder(finished).report.read_text()
    assert page.count("<svg") == 8
    assert "data:image/png;base64," in page
    assert not re.search(r"src=.http|<script|<link|@import", page)


def test_the_same_seed_trains_the_same_encoder(betons: Betons, finished: Path, tmp_path: Path) -> None:
    assert main(arguments(betons, tmp_path / "run", "--epochs=3", "--warmup-epochs=1", "--workers=1")) == 0
    assert encoders_are_equal(finished, tmp_path / "run")


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.alone)])  # two wait where a core is taken
def test_a_given_number_of_threads_trains_the_same_encoder_each_time(
    betons: Betons, tmp_path: Path, threads: int
) -> None:
    for name in ("first", "again"):
        asked = arguments(betons, tmp_path / name, "--epochs=2", "--warmup-epochs=1", f"--threads={threads}")
        assert main(asked) == 0
        assert torch.get_num_threads() == threads
    assert encoders_are_equal(tmp_path / "first", tmp_path / "again")


def test_scores_in_the_midst_of_training_change_nothing(betons: Betons, finished: Path, tmp_path: Path) -> None:
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    assert main([*asked, "--knn-at=0.8,0.4", "--log-every=5"]) == 0
    assert encoders_are_equal(finished, tmp_path / "run")
    rows = {row["step"]: row for row in read_metrics(RunFolder(tmp_path / "run").metrics)}
    assert sorted(rows) == [5, 6, 10, 12, 15]
    assert [step for step, row in rows.items() if "knn_top1" in row] == [6, 12, 15]
    assert "kNN top-1" in RunFolder(tmp_path / "run").report.read_text()


def test_a_folder_has_one_run_at_a_time(betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=2", "--warmup-epochs=1")
    (tmp_path / "run").mkdir()
    with lock(RunFolder(tmp_path / "run")):
        assert main(asked) == 2
    said = capsys.readouterr().err
    assert "another process trains in" in said
    assert not list((tmp_path / "run").iterdir())
    assert main(asked) == 0


def test_divergence_ends_with_status_3(betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=9", "--warmup-epochs=0", "--base-lr=1e30")
    assert main(asked) == 3
    assert "steps in a row" in capsys.readouterr().err
    assert not RunFolder(tmp_path / "run").result.exists()


def test_a_crop_ramp_in_bfloat16_runs_to_its_end(betons: Betons, tmp_path: Path) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=2", "--warmup-epochs=1", "--crop-ramp=16")
    assert main([*asked, "--precision=bfloat16"]) == 0
    sizes = [row["crop_px"] for row in read_metrics(RunFolder(tmp_path / "run").metrics)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {16, 20, 24}
    assert RunFolder(tmp_path / "run").result.exists()
