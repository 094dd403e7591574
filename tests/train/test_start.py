"""Laws of a run that starts from weights: a run's, a file's, also after a kill; what does not fit is named."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastbyol.cli import eval as evaluation
from fastbyol.cli.train import main
from fastbyol.errors import ConfigError
from fastbyol.model.byol import BYOL
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import named
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder
from fastbyol.train import start
from fastbyol.weights import read
from fastbyol.weights.match import match
from tests.conftest import Betons, write_beton
from tests.support.commands import Fork, wait_until
from tests.support.runs import arguments, encoders_are_equal

SHORT = ("--epochs=1", "--warmup-epochs=0")


def metadata_of(file: Path) -> dict[str, str]:
    """Return what a safetensors file says beside its tensors."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def state_of(run: Path) -> dict[str, Tensor]:
    """Return the newest state of a run's networks."""
    model: dict[str, Tensor] = checkpoint.load_newest(RunFolder(run).checkpoints)[0]["model"]
    return model


def started(init: Path | str, recipe: str = "demo") -> tuple[BYOL, str]:
    """Start a model from weights; return it and the line on what was taken."""
    chosen = named(recipe)
    model = BYOL(chosen.encoder, chosen.head, seed=5)
    return model, start.start_(model, read(str(init)))


def refused(init: Path | str, recipe: str = "demo") -> str:
    """Return the message with which weights are refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        started(init, recipe)
    return str(caught.value)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str = "") -> bool:
    return all(torch.equal(value, wanted[prefix + name]) for name, value in found.items())


def test_a_runs_encoder_and_heads_start_both_networks(finished: Path) -> None:
    model, line = started(finished)
    wanted = state_of(finished)
    assert same(model.online.state_dict(), wanted, "online.")
    assert same(model.predictor.state_dict(), wanted, "predictor.")
    assert model.target is not None
    assert same(model.target.state_dict(), wanted, "online.")
    assert line == f"starts from {finished}: encoder and heads"


def test_an_encoders_file_starts_the_encoder_alone(finished: Path, tmp_path: Path) -> None:
    drawn = BYOL(named("demo").encoder, named("demo").head, seed=5)
    tensors = load_file(RunFolder(finished).encoder)
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "e.pth")
    for file in (RunFolder(finished).encoder, tmp_path / "e.pth"):
        model, line = started(file)
        assert same(model.online.encoder.state_dict(), tensors)
        assert same(model.online.projector.state_dict(), drawn.online.projector.state_dict())
        assert line == f"starts from {file}: encoder"


def test_heads_of_another_size_begin_anew_and_that_is_said(finished: Path) -> None:
    model, line = started(finished, "demo+hidden=32")
    assert same(model.online.encoder.state_dict(), state_of(finished), "online.encoder.")
    assert line.endswith("encoder; its heads have other sizes, so the heads begin anew")


def test_a_predictor_for_local_views_starts_where_it_has_one(finished: Path) -> None:
    recipe = named("demo+local_views=2+local_predictor=true")
    heads = read(str(finished)).heads
    local = {f"local_{name}": value + 1 for name, value in heads.items() if name.startswith("predictor.")}
    for found, ending in ((heads | local, "encoder and heads"), (heads, "so that one begins anew")):
        model = BYOL(recipe.encoder, recipe.head, seed=5)
        assert model.local_predictor is not None
        drawn = {name: value.clone() for name, value in model.local_predictor.state_dict().items()}
        line = start.start_(model, replace(read(str(finished)), heads=found))
        assert line.endswith(ending)
        assert same(model.predictor.state_dict(), heads, "predictor.")
        own = model.local_predictor.state_dict()
        assert same(own, local, "local_predictor.") if found is not heads else same(own, drawn)


def test_a_classifier_is_left_out_and_other_networks_are_refused(finished: Path, tmp_path: Path) -> None:
    tensors = load_file(RunFolder(finished).encoder)
    file = tmp_path / "classifier.safetensors"
    save_file(tensors | {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}, file)
    assert started(file)[1].endswith("encoder; fc.bias, fc.weight are not used")
    assert "conv1.weight is [32, 3, 3, 3], wanted [64, 3, 3, 3]" in refused(file, "demo+width=1")
    assert "missing (layer1.1.conv1.weight, " in refused(file, "demo+arch=resnet18")
    save_file({name: value for name, value in tensors.items() if name != "bn1.bias"}, file)
    assert "1 of its tensors are missing (bn1.bias)" in refused(file)
    save_file(tensors | {"layer9.bias": torch.zeros(1)}, file)
    assert "1 are too many (layer9.bias)" in refused(file)
    assert "stem cifar_stride2, the recipe's has cifar;" in refused(RunFolder(finished).encoder, "demo+stem=cifar")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_first(
    finished: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, file = load_file(RunFolder(finished).encoder), tmp_path / "e.pth"
    tensors["bn1.bias"][1] = tensors["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, file)
    said = f"{file} has NaN or Inf in module.bn1.bias; give weights of a training that did not diverge"
    assert refused(file) == said
    weights = read(str(finished))
    heads = {name: tensor.clone() for name, tensor in weights.heads.items()}
    heads["predictor.0.bias"][0] = value
    model = BYOL(named("demo").encoder, named("demo").head, seed=5)
    with pytest.raises(ConfigError, match=r"has NaN or Inf in predictor\.0\.bias; give"):
        start.start_(model, replace(weights, heads=heads))
    images = ["--train=none.beton", "--val=none.beton"]
    save_file(tensors, scored := tmp_path / "e.safetensors", metadata=metadata_of(RunFolder(finished).encoder))
    assert evaluation.main(["knn", str(scored), *images, "--px=24"]) == 2
    assert "has NaN or Inf in bn1.bias" in capsys.readouterr().err


def test_weights_that_are_finite_in_their_own_type_alone_are_refused(finished: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in load_file(RunFolder(finished).encoder).items()}
    tensors["bn1.bias"][0] = 1e300
    save_file(tensors, tmp_path / "e.safetensors")
    assert "has NaN or Inf in bn1.bias" in refused(tmp_path / "e.safetensors")


def test_a_mask_of_the_network_itself_may_hold_infinity() -> None:
    mask = {"mask": torch.full((2, 2), -math.inf)}
    assert match(mask, mask, source="s")[0] == mask


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "does not load"), (b"text", "does not load"), (None, "does not exist")]
)
def test_what_holds_no_weights_ends_in_one_line(
    betons: Betons, tmp_path: Path, content: bytes | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.pth"
    if content is not None:
        file.write_bytes(content)
    assert main([*arguments(betons, tmp_path / "run", *SHORT), f"--init={file}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert reason in said[0]
    assert "give a run folder, a checkpoint" in said[0]
    assert not RunFolder(tmp_path / "run").config.exists()


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"weights of {package} need the package, which cannot be imported" in refused(f"{package}:resnet18")


def test_a_run_starts_from_another_on_other_data_and_says_so(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_beton(tmp_path / "other.beton", 96, split="val"), tmp_path / "run"
    asked = ["demo+crop_px=24", f"--data={data}", f"--val={betons.val}", f"--out={out}", "--batch-size=32"]
    assert main([*asked, *SHORT, "--device=cpu", f"--init={finished}"]) == 0
    assert f"starts from {finished}: encoder and heads" in capsys.readouterr().err
    config, result = (json.loads(path.read_text()) for path in (RunFolder(out).config, RunFolder(out).result))
    assert config["init"] == str(finished)
    assert len(config["init_digest"]) == 32
    assert result["knn_top1_at_start"] > result.get("knn_top1_random_init", 0)
    assert str(finished) in RunFolder(out).report.read_text()


@pytest.mark.parametrize("has_checkpoint", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_run_that_started_from_weights_is_bit_equal(
    betons: Betons, finished: Path, tmp_path: Path, has_checkpoint: bool
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(finished, weights)
    settings = ("--epochs=2", "--warmup-epochs=1", f"--init={weights}")
    assert main(arguments(betons, tmp_path / "whole", *settings)) == 0
    out = tmp_path / "killed"
    asked = arguments(betons, out, *settings)
    process = Fork(tmp_path / "said", *asked, "--checkpoint-every=0.01s")
    wait_until(lambda: len(read_metrics(RunFolder(out).metrics)) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if has_checkpoint:
        shutil.rmtree(weights)  # not needed any more
    else:
        shutil.rmtree(RunFolder(out).checkpoints)
    assert main([*asked, "--resume"]) == 0
    assert encoders_are_equal(tmp_path / "whole", out)


def test_other_weights_do_not_continue_a_run(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    weights = shutil.copy(RunFolder(finished).encoder, tmp_path / "weights.safetensors")
    asked = arguments(betons, out, *SHORT)
    assert main([*asked, f"--init={weights}"]) == 0
    capsys.readouterr()

    def resume(*more: str) -> tuple[int, Any]:
        return main([*asked, "--resume", *more]), capsys.readouterr().err

    RunFolder(out).result.unlink()
    assert resume()[0] == 0  # they need not be given again
    RunFolder(out).result.unlink()
    status, said = resume(f"--init={finished}")
    assert status == 2
    assert f"--init {finished} is given, but the run began with {weights}" in said
    tensors = load_file(weights)
    save_file({**tensors, "conv1.weight": tensors["conv1.weight"] + 1}, weights)
    shutil.rmtree(RunFolder(out).checkpoints)
    status, said = resume()
    assert status == 2
    assert f"{weights} holds other weights than the run began with" in said


def test_the_digest_in_a_file_of_settings_is_not_that_of_a_new_start(finished: Path) -> None:
    config = replace(RunFolder(finished).read_config(), init="other.pth", init_digest="of earlier weights")
    assert start.settle(config, None) == ("other.pth", None)
