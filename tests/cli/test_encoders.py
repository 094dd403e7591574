"""Laws of the encoders that evaluations take: of runs, files, checkpoints, packages, and drawn ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbyol.cli import embed
from fastbyol.cli.encoders import open_encoder, settle_px
from fastbyol.cli.eval import main
from fastbyol.cli.train import main as train
from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.model.resnet import build
from fastbyol.recipes import named
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import load_scores
from tests.conftest import Betons
from tests.support.runs import arguments


@pytest.fixture(scope="module")
def run(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one epoch."""
    out = tmp_path_factory.mktemp("encoders") / "run"
    assert train(arguments(betons, out, f"--val={betons.val}", "--epochs=1", "--warmup-epochs=0")) == 0
    return out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, in which scores of other encoders are kept."""
    monkeypatch.chdir(tmp_path)


def never(said: str) -> None:
    """Take no notice of a run that has not finished: none is expected."""
    raise AssertionError(said)


def knn(betons: Betons, encoder: Path | str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """Score an encoder by kNN."""
    assert main(["knn", str(encoder), f"--train={betons.train}", f"--val={betons.val}", "--json", *more]) == 0
    scores: dict[str, Any] = json.loads(capsys.readouterr().out)
    return scores


def test_a_checkpoint_and_a_file_score_as_their_run(
    betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = knn(betons, run, capsys)
    (newest,) = RunFolder(run).checkpoints.glob("*5.pt")
    for encoder, more in ((newest, ()), (RunFolder(run).encoder, ("--px=32",))):
        scores = knn(betons, encoder, capsys, *more)
        assert scores["trained"] == expected["trained"]
        assert scores["random_init"] == expected["random_init"]
    assert expected in load_scores(RunFolder(run))
    assert len(list(Path("runs").glob("*/scores/*.json"))) == 2


def test_random_scores_the_network_that_a_recipe_draws(
    betons: Betons, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = knn(betons, run, capsys)
    scores = knn(betons, "random:demo", capsys)
    assert scores["random_init"] == expected["random_init"]
    assert "trained" not in scores
    assert load_scores(RunFolder(Path("runs/random-demo"))) == [scores]
    assert main(["knn", "random:demo", f"--train={betons.train}", f"--val={betons.val}"]) == 0
    assert f"{scores['random_init']['top1']:.2f} % random init" in capsys.readouterr().out


def test_networks_of_others_see_images_as_imagenet_does(tmp_path: Path) -> None:
    torch.save(build(EncoderConfig("resnet18", 0.5), seed=0).state_dict(), tmp_path / "e.pth")
    found = open_encoder(str(tmp_path / "e.pth"), notify=never)
    assert found.config == EncoderConfig("resnet18", 0.5)
    assert (found.px, found.margin) == (224, 0.875)
    assert not found.encoder.training
    drawn = open_encoder("random:resnet8", notify=never)
    assert (drawn.config, drawn.px) == (EncoderConfig("resnet8"), 224)
    assert open_encoder("random:demo", notify=never).px == named("demo").eval_px


def test_an_exported_file_wants_its_size(run: Path) -> None:
    text = str(RunFolder(run).encoder)
    with pytest.raises(ConfigError, match=r"does not say at what size it sees images; give it, as in --px 224"):
        settle_px(text, open_encoder(text, notify=never), None)
    assert settle_px(text, open_encoder(text, notify=never), 48) == 48


def test_an_unfinished_run_is_scored_by_its_checkpoint(
    betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(run, tmp_path / "unfinished")
    RunFolder(out).result.unlink()
    (newest,) = RunFolder(out).checkpoints.glob("*5.pt")
    scores, expected = knn(betons, out, capsys), knn(betons, run, capsys)["trained"]
    assert scores["unfinished"]["step"] == 5
    assert scores["trained"] == knn(betons, newest, capsys)["trained"] == expected
    assert "step 5, val.beton" in RunFolder(out).report.read_text()


def test_embed_takes_what_evaluations_take(betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["random:demo", str(betons.val), f"--out={tmp_path / 'vectors.npy'}", "--json"]
    assert embed.main(asked) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 60


def test_semi_keeps_the_split_of_a_drawn_encoder(betons: Betons, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["semi", "random:demo", f"--train={betons.train}", f"--val={betons.val}", "--fraction=.3"]
    assert main([*asked, "--lrs=.1", "--epochs=1", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert "supervised" in scores
    assert Path(scores["split"]).parent == Path("runs/random-demo/splits")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nowhere", "nowhere does not exist; give a run folder, a checkpoint"),
        ("random:nothing", "no encoder 'nothing'; choose one of resnet8,"),
        ("random:demo+x=1", "'x=1' is not a setting"),
        ("small.pth", "small.pth does not say what its stem of 3x3 strides; give the folder of its run"),
        ("other.pth", "other.pth is no ResNet, or holds several"),
        ("deep.pth", r"deep.pth has stages of (2, 2, 2, 3) blocks"),
        ("cut.pt", "cut.pt"),
    ],
)
def test_what_is_no_encoder_ends_in_one_line(
    betons: Betons, run: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(load_file(RunFolder(run).encoder), "small.pth")
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    state = build(EncoderConfig("resnet18", 0.125), seed=0).state_dict()
    torch.save(state | {name.replace("r4.1", "r4.2"): value for name, value in state.items()}, "deep.pth")
    (newest,) = RunFolder(run).checkpoints.glob("*5.pt")
    Path("cut.pt").write_bytes(newest.read_bytes()[5:])
    assert main(["knn", text, f"--train={betons.train}", f"--val={betons.val}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert reason in said[0]
