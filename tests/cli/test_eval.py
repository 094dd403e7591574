"""Laws of fastbyol-eval: both encoders scored, JSON on request, one clear line for every wrong input."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbyol.cli.eval import main
from fastbyol.cli.train import main as train
from fastbyol.errors import ConfigError
from fastbyol.evaluate import linear
from fastbyol.export import load_encoder, save_encoder
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import load_scores, save_scores
from tests.conftest import Betons
from tests.evaluate.test_segmentation import draw


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
    assert scores["raw_pixels"]["top1"] == pytest.approx(result["knn_top1_raw_pixels"])
    assert scores["trained"]["bank"] == 160


def test_the_report_shows_the_latest_scores(betons: Betons, run: Path) -> None:
    report = RunFolder(run).report
    for _ in range(2):
        assert main(["knn", str(run), *files(betons)]) == 0
        assert report.read_text().count("knn top-1:") == 1
    saved = [scores for scores in load_scores(RunFolder(run)) if scores["protocol"] == "knn"]
    assert f"{saved[0]['trained']['top1']:.2f} % trained" in report.read_text()


def test_knn_scores_every_cell_and_headlines_the_first(
    betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["knn", str(run), *files(betons), "--k", "5", "20", "--temperature", ".1", ".5", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["trained"]
    assert (scored["k"], scored["temperature"]) == (5, 0.1)
    assert [(cell["k"], cell["temperature"]) for cell in scored["cells"]] == [
        (k, t) for k in (5, 20) for t in (0.1, 0.5, None)
    ]
    assert scored["top1"] == scored["cells"][0]["top1"]


@pytest.mark.parametrize(
    ("command", "beside"),
    [
        ("linear --cached --epochs 2", "random_init"),
        ("linear --epochs 1 --lrs .1 .2 --skip-random-init", None),
        ("semi --fraction .3 --lrs .1 --epochs 1", "supervised"),
        ("transfer --metric map11", "random_init"),
        ("finetune --steps 2 --lrs .01 --weight-decays 0 --metric mean-per-class", None),
    ],
)
def test_each_protocol_scores_and_keeps_its_scores(
    command: str, beside: str | None, betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol, *settings = command.split()
    assert main([protocol, str(run), *files(betons), *settings, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores in load_scores(RunFolder(run))
    assert {"trained", "random_init", "supervised"} & scores.keys() == {"trained", beside} - {None}
    low, high = scores["trained"]["top1_interval"]
    assert 0 <= low <= scores["trained"]["top1"] <= high <= 100


def test_semi_stores_its_split_and_takes_it_again(
    betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["semi", str(run), *files(betons), "--lrs=.1", "--epochs=1", "--skip-supervised", "--json"]
    assert main([*asked, "--fraction=.2"]) == 0
    first = json.loads(capsys.readouterr().out)
    stored = Path(first["split"])
    copied = shutil.copy(stored, tmp_path / "split.json")
    assert main([*asked, f"--split={copied}"]) == 0
    assert json.loads(capsys.readouterr().out)["trained"] == first["trained"]
    assert first["trained"]["labelled"] == len(json.loads(stored.read_text())["learn"])


def test_what_cannot_be_kept_in_the_run_folder_is_scored_all_the_same(
    betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    for place in (folder.splits, folder.scores):
        shutil.rmtree(place, ignore_errors=True)
        place.write_text("in the way")  # as root, only this keeps a folder from being written
    asked = ["semi", str(folder.path), *files(betons), "--fraction=.2", "--lrs=.1", "--epochs=1", "--skip-supervised"]
    assert main([*asked, "--json"]) == 0
    said = capsys.readouterr()
    scores = json.loads(said.out)
    assert scores["split"] is None
    assert scores["trained"]["labelled"] == 30  # three of each class
    assert "warning: the split could not be saved in" in said.err
    assert "warning: the score could not be saved in" in said.err


def test_segment_scores_a_fifth_of_the_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = draw(tmp_path, 5, seed=0)
    asked = ["segment", str(run), f"--images={images}", f"--masks={masks}", "--steps=2", "--batch-size=2"]
    assert main([*asked, "--crop-px=32", "--stride=4", "--device=cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 <= scores["trained"]["miou"] <= 100
    assert scores["classes"] == 2
    assert main([*asked, "--crop-px=32", "--stride=4", f"--val-images={images}"]) == 2
    assert "give both" in capsys.readouterr().err


def test_scores_are_kept_a_file_for_each_protocol_part_and_data_set(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    semi = {"protocol": "semi", "fraction": 0.01, "train": "cars/train.beton", "val": "v", "trained": {"top1": 1.0}}
    others = [
        {**semi, "fraction": 0.1},
        {**semi, "train": "pets/train.beton"},
        {**semi, "protocol": "knn"},
        {**semi, "protocol": "knn", "bank": 500},
        {**semi, "val": "w"},
        {**semi, "val": "other/v"},
        {**semi, "train": "elsewhere/cars/train.beton"},  # a folder and a file of the same names
    ]
    for scores in (semi, *others, {**semi, "trained": {"top1": 2.0}}):
        save_scores(folder, scores)
    assert sorted(scores["trained"]["top1"] for scores in load_scores(folder)) == [1.0] * 7 + [2.0]
    (folder.scores / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken.json is no score"):
        load_scores(folder)


def test_what_was_scored_before_an_interruption_is_kept(
    betons: Betons, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copied / "scores", ignore_errors=True)
    score, calls = linear.score, []

    def interrupted(*given: Any, **how: Any) -> linear.Score:
        calls.append(given)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return score(*given, **how)

    monkeypatch.setattr(linear, "score", interrupted)
    assert main(["linear", str(copied), *files(betons), "--cached", "--epochs=1"]) == 75
    (found,) = load_scores(RunFolder(copied))
    assert "trained" in found
    assert "random_init" not in found


def test_an_encoder_that_diverged_is_refused(
    betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    encoder = load_encoder(run)
    torch.nn.init.constant_(encoder.conv1.weight, float("nan"))
    save_encoder(tmp_path / "copy" / "encoder.safetensors", encoder, encoder.config)
    assert main(["knn", str(tmp_path / "copy"), *files(betons)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "NaN or inf in 160 of 160 images" in said


def test_ctrl_c_ends_with_75(
    betons: Betons, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbyol.evaluate.metrics.top1", interrupt)
    assert main(["linear", str(run), *files(betons), "--cached", "--epochs=1"]) == 75
    assert capsys.readouterr().err == "fastbyol-eval: interrupted\n"


@pytest.mark.parametrize(
    "words", ["linear --lrs 0", "semi --fraction 1", "finetune --weight-decays -1", "linear --lrs nan", "knn --bank 0"]
)
def test_a_setting_out_of_range_ends_in_one_line(
    words: str, betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol, *settings = words.split()
    with pytest.raises(SystemExit, match="2"):
        main([protocol, str(run), *files(betons), *settings])
    assert capsys.readouterr().err.count("\n") == 1


def test_linear_scores_both_encoders_in_a_sentence(
    betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["linear", str(run), *files(betons), "--epochs=1"]) == 0
    said = capsys.readouterr().out
    assert "linear top-1" in said
    assert "random init" in said
    assert "top-5" in said


def unfinished(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("result.json", "encoder.safetensors"))
    return tmp_path / "copy"


def without_checkpoint(run: Path, tmp_path: Path) -> Path:
    shutil.rmtree(unfinished(run, tmp_path) / "checkpoints")
    return tmp_path / "copy"


def test_an_unfinished_run_is_scored_from_its_checkpoint(
    betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["knn", str(run), *files(betons), "--json"]) == 0
    finished = json.loads(capsys.readouterr().out)
    folder = unfinished(run, tmp_path)
    assert main(["knn", str(folder), *files(betons), "--json"]) == 0
    ended = capsys.readouterr()
    scores = json.loads(ended.out)
    assert ended.err == (
        f"fastbyol-eval: the run in {folder} has not finished: this is its encoder after step 5, 100% of it\n"
    )
    assert scores["trained"] == finished["trained"]  # this checkpoint is of the last step
    assert scores["unfinished"] == {"step": 5, "progress": 1.0}
    (newest,) = (folder / "checkpoints").iterdir()
    newest.write_bytes(newest.read_bytes()[:-1])
    assert main(["knn", str(folder), *files(betons)]) == 2
    said = capsys.readouterr().err
    assert "continue it with fastbyol-train --resume" in said
    assert "does not load" in said


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no run", "holds no run"),
        ("no checkpoint", "has not finished"),
        ("missing file", "none.beton"),
        ("unlabelled", "no labels"),
        ("k of zero", "from 1 to the 160"),
        ("a temperature of zero", "give more than 0"),
    ],
)
def test_bad_input_ends_with_one_clear_line_and_status_2(
    case: str, expected: str, betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = {"no run": tmp_path, "no checkpoint": without_checkpoint(run, tmp_path)}.get(case, run)
    val = {"missing file": tmp_path / "none.beton", "unlabelled": betons.unlabelled}.get(case, betons.val)
    k = "0" if case == "k of zero" else "20"
    temperatures = ["--temperature", "0.1", *(["0"] if case == "a temperature of zero" else [])]
    assert main(["knn", str(folder), f"--train={betons.train}", f"--val={val}", f"--k={k}", *temperatures]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastbyol-eval: error: ")
    assert said.count("\n") == 1
    assert expected in said
