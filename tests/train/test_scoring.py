"""Laws of scores within a run: measures without labels in rows, result and report, as fastbyol-eval computes them."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path

import pytest
import torch

from fastbyol.beton import Reader
from fastbyol.cli.eval import main as evaluate
from fastbyol.cli.train import main
from fastbyol.config import Config
from fastbyol.evaluate.features import OutOfTime
from fastbyol.model.parts import Encoder, build_encoder
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import named
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.threads import NO_TUNING
from fastbyol.train import scoring
from fastbyol.train.scoring import MEASURES, Scorer
from tests.conftest import Betons
from tests.monitor.test_tensorboard import read
from tests.support.runs import arguments, encoders_are_equal


def make_scorer(
    betons: Betons, encoder: Encoder, train: Reader, said: list[str], *, val: Reader | None = None
) -> Scorer:
    config = Config(named("demo"), data=str(betons.train), val=None if val is None else str(betons.val), epochs=9.0)
    scored = None if val is None else (train, val)
    return Scorer(config, encoder, train=train, scored=scored, threads=NO_TUNING, warn=said.append)


@pytest.fixture
def encoder() -> Encoder:
    return build_encoder(named("demo").encoder, seed=0, views=2).train()


def test_an_unlabelled_run_is_measured_on_its_way_which_changes_nothing(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["demo", f"--data={betons.unlabelled}", "--batch-size=8", "--epochs=2", "--warmup-epochs=1", "--device=cpu"]
    assert main([*asked, f"--out={tmp_path / 'a'}", "--quality-at=0.8,0.4", "--log-every=5"]) == 0
    assert main([*asked, f"--out={tmp_path / 'b'}"]) == 0
    assert encoders_are_equal(tmp_path / "a", tmp_path / "b")
    folder = RunFolder(tmp_path / "a")
    rows, result = read_metrics(folder.metrics), json.loads(folder.result.read_text())
    assert [row["step"] for row in rows] == [4, 5, 8, 10]
    assert [row["step"] for row in rows if MEASURES[0] in row] == [4, 8, 10]
    assert result["quality"] == {name: rows[-1][name] for name in MEASURES}
    assert result["quality_random_init"].keys() == result["quality"].keys()
    assert result["knn_top1"] is None
    shown = read(folder.tensorboard)
    for name in MEASURES:
        assert [step for step, _ in shown[f"scores/{name}"]] == [0, 4, 8, 10]
        assert shown[f"scores/{name}"][0][1] == pytest.approx(result["quality_random_init"][name])
        assert shown[f"scores/{name}"][-1][1] == pytest.approx(rows[-1][name])
    page = folder.report.read_text()
    for text in ("Measured without labels.", "Without labels", "RankMe, from", "Uniformity, from", "with their cosine"):
        assert text in page
    assert page.count('<div class="neighbours">') == scoring.SHOWN_QUERIES
    assert "✓ " not in page
    capsys.readouterr()
    assert evaluate(["quality", str(folder.path), f"--train={betons.unlabelled}", "--device=cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)  # the same images, all of them, and the same crops
    for name in MEASURES:
        assert scores["trained"][name] == pytest.approx(result["quality"][name], rel=1e-3)
        assert scores["random_init"][name] == pytest.approx(result["quality_random_init"][name], rel=1e-3)


def test_a_labelled_run_has_both_kinds_of_scores(betons: Betons, tmp_path: Path) -> None:
    assert main(arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--knn-at=0.5")) == 0
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    scored = [row for row in rows if "knn_top1" in row]
    assert len(scored) == 2
    assert scored[1] == rows[-1]
    assert all(set(MEASURES) <= row.keys() for row in scored)
    assert "Without labels" in RunFolder(tmp_path / "run").report.read_text()


def test_a_collapse_is_measured_and_nan_is_told(betons: Betons, encoder: Encoder) -> None:
    said: list[str] = []
    with Reader(betons.unlabelled) as train:
        scorer = make_scorer(betons, encoder, train, said)
        torch.nn.init.zeros_(encoder.get_submodule("layer3.0.bn2").weight)
        torch.nn.init.zeros_(encoder.get_submodule("layer3.0.downsample.1").weight)
        assert scorer.score() == {"rankme": 1.0, "effective_rank": 1.0, "alignment": 0.0, "uniformity": 0.0}
        assert not said
        torch.nn.init.constant_(encoder.get_submodule("conv1").weight, math.nan)
        assert scorer.score() == {}
    assert said == ["the representations hold NaN or inf: they are not measured"]


def test_what_is_known_when_time_ends_is_kept(betons: Betons, encoder: Encoder) -> None:
    with Reader(betons.train) as train, Reader(betons.val) as val:
        scorer = make_scorer(betons, encoder, train, [], val=val)
        whole = scorer.score()
        assert set(whole) == {"knn_top1", *MEASURES}
        assert encoder.training
        before_crops, asked = sum(math.ceil(len(each) / scorer.inputs.batch) for each in (train, val)), count()
        assert scorer.score(lambda: next(asked) >= before_crops) == {"knn_top1": whole["knn_top1"]}
        assert scorer.score(lambda: True) == {}
        assert encoder.training
        with pytest.raises(OutOfTime):
            scorer._pairs(lambda: True)
