"""Parts from outside the package: the examples of docs/extending.md train, resume and are scored by the commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastbyol import registry
from fastbyol.cli import eval as evaluation
from fastbyol.cli.train import main
from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.export import load_encoder
from fastbyol.model.parts import build_encoder
from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import arguments, wait_until

EXAMPLE = re.compile(r"```python\n# mypackage/(\w+\.py)\n(.*?)```", re.DOTALL)
OWN_RECIPE = "demo+arch=mypackage.encoder:build+loss=mypackage.objective:Cosine"
OWN_FLAGS = ("--loader=mypackage.loader:load", "--optimizer=mypackage.optimizer:SGD", "--base-lr=0.05")


def examples() -> dict[str, str]:
    """Return the modules of docs/extending.md by file name."""
    return dict(EXAMPLE.findall((Path(__file__).parents[2] / "docs" / "extending.md").read_text()))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Write the examples as a package; return the folder that it is imported from."""
    package = tmp_path / "mypackage"
    package.mkdir()
    for name, text in examples().items():
        (package / name).write_text(text)
    return tmp_path


def start(place: Path, *command: str) -> subprocess.Popen[str]:
    """Start fastbyol-train where mypackage can be imported."""
    paths = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "fastbyol.train", *command],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_page_has_an_example_of_every_part_that_can_come_from_outside() -> None:
    assert {"models.py", "encoder.py", "objective.py", "loader.py", "optimizer.py", "protocol.py"} <= examples().keys()


@pytest.mark.slow
def test_parts_from_outside_train_resume_and_are_scored(
    betons: Betons, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(place / "run")
    _, *given = arguments(betons, folder.path, f"--val={betons.val}", "--epochs=60", *OWN_FLAGS)
    process = start(place, OWN_RECIPE, *given)
    wait_until(lambda: folder.metrics.exists() and len(read_metrics(folder.metrics)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.communicate()
    stopped_at = len(read_metrics(folder.metrics))
    process = start(place, OWN_RECIPE, *given, "--resume")
    assert process.wait() == 0, process.communicate()
    rows, result = read_metrics(folder.metrics), json.loads(folder.result.read_text())
    assert stopped_at < len(rows) == result["steps"] == 200
    assert rows[-1]["loss"] < rows[0]["loss"] < 4
    assert result["knn_top1"] > 100 / 16
    config = folder.read_config()
    assert (config.recipe.encoder.arch, config.recipe.objective.loss) == (
        "mypackage.encoder:build",
        "mypackage.objective:Cosine",
    )

    with pytest.raises(ConfigError, match=r"'mypackage\.encoder:build', which could do anything; .* trust=True"):
        load_encoder(folder.path)
    assert "mypackage.encoder" not in sys.modules
    monkeypatch.syspath_prepend(place)
    assert load_encoder(folder.path, trust=True).features == 16
    files = [f"--train={betons.train}", f"--val={betons.val}"]
    assert evaluation.main(["knn", str(folder.path), *files, "--json"]) == 0
    assert evaluation.main(["mypackage.protocol:PROTOCOL", str(folder.path), *files, "--images=20", "--json"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--loader=mypackage.none:load"], "loader 'mypackage.none:load' cannot be imported"),
        (["--optimizer=mypackage.optimizer:Adam"], "optimizer 'mypackage.optimizer:Adam' cannot be imported"),
        (["--loader=natif"], "no loader 'natif'; choose one of native, memory, ffcv, dali"),
        (
            ["--optimizer=adam"],
            "no optimizer 'adam'; choose one of lars, sgd, muon, adamw, apex-larc, or give your own as "
            "module:attribute",
        ),
    ],
)
def test_a_part_that_is_not_there_is_refused_before_anything_is_written(
    betons: Betons, place: Path, changes: list[str], message: str
) -> None:
    folder = RunFolder(place / "run")
    process = start(place, *arguments(betons, folder.path, "--epochs=1", *changes))
    _, errors = process.communicate()
    assert process.returncode == 2
    assert message in errors
    assert not folder.config.exists()


class Spare(nn.Module):
    """A network that never uses `spare`, and in training its layer `other` in the first `uses` calls alone."""

    num_features, uses = 8, sys.maxsize

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spare, self.other = nn.Conv2d(3, 8, 3, 4), nn.Linear(8, 3), nn.Conv2d(8, 8, 1)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to representations [N, 8]."""
        x = self.stem(images).relu()
        self.calls += self.training
        return (self.other(x) if self.calls < self.uses else x).mean((2, 3))


class Fading(Spare):
    """The same with a layer that only the first steps use."""

    uses = 3


@pytest.mark.parametrize(
    ("optimizer", "change", "status"),
    [
        ("lars", "", 2),
        ("muon", "", 2),
        ("adamw", "", 0),
        ("lars", "+frozen=spare", 0),
        ("muon", "+frozen=spare.weight spare.bias", 0),
    ],
)
def test_parameters_that_a_forward_does_not_use_are_refused_at_once_or_stay_as_drawn(
    optimizer: str,
    change: str,
    status: int,
    betons: Betons,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "spare", SimpleNamespace(build=Spare))
    run = RunFolder(tmp_path / "run")
    _, *given = arguments(betons, run.path, f"--optimizer={optimizer}", "--base-lr=0.01", "--epochs=1")
    asked = [f"demo+encoder=spare:build{change}", *given, "--warmup-epochs=0"]
    assert main(asked) == status
    if status:
        assert main([*asked, "--plan"]) == status
        said = capsys.readouterr().err.splitlines()
        assert said == 2 * [
            "fastbyol-train: error: encoder spare:build does not use spare.weight, spare.bias in its forward, so there "
            "is no gradient to learn by; leave that out of the network, or keep it as drawn by +frozen=spare.weight "
            "after the recipe's name, in quotes where there are more names, with spaces between"
        ]
        assert not run.config.exists()
        return
    assert main([*asked, "--resume", "--epochs=2"]) == 0
    drawn = build_encoder(run.read_config().recipe.encoder, seed=0).state_dict()
    trained = load_encoder(run.path, trust=True).state_dict()
    assert {name for name in drawn if torch.equal(drawn[name], trained[name])} == {"spare.weight", "spare.bias"}


def test_auto_names_a_parameter_that_a_forward_does_not_use(
    betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "spare", SimpleNamespace(build=Spare))
    asked = ["demo+encoder=spare:build", f"--data={betons.train}", f"--out={tmp_path / 'run'}", "--device=cpu"]
    assert main([*asked, "--method=auto", "--budget=60s"]) == 2
    assert "does not use spare.weight, spare.bias in its forward" in capsys.readouterr().err


def test_a_parameter_that_is_not_always_used_ends_a_run_in_one_line(
    betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "spare", SimpleNamespace(build=Fading))
    _, *given = arguments(betons, tmp_path / "run", "--epochs=1", "--warmup-epochs=0")
    assert main(["demo+encoder=spare:build+frozen=spare", *given]) == 2
    assert re.search(
        r"error: a parameter of shape \(8, 8, 1, 1\) has no gradient.*frozen=NAME\n", capsys.readouterr().err
    )


class Weighted(nn.Module):
    """A loss with a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, q: Tensor, z: Tensor) -> Tensor:
        """Compute the squared distance of predictions q and projections z [2B, D]."""
        return (q - z).square().mean()


def test_parameters_that_a_loss_does_not_use_are_refused_at_once(
    betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "weighted", SimpleNamespace(build=lambda _, **__: Weighted()))
    _, *given = arguments(betons, tmp_path / "run", "--epochs=1", "--warmup-epochs=0")
    assert main(["demo+loss=weighted:build", *given]) == 2
    assert "loss weighted:build does not use objective.weight; leave that out" in capsys.readouterr().err
    assert not RunFolder(tmp_path / "run").config.exists()


@pytest.mark.parametrize("loss", ["mypackage:none:Loss", "cosine"])
def test_a_loss_of_no_known_form_is_refused_with_the_choices(loss: str) -> None:
    from fastbyol.recipes import named  # noqa: PLC0415

    choices = "choose one of byol, vicreg, coding-rate, or give your own as module:attribute"
    with pytest.raises(ConfigError, match=f"no objective .*; {choices}"):
        named(f"demo+loss={loss}")


def test_a_network_of_no_known_form_becomes_an_encoder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbyol.model.parts import build_encoder  # noqa: PLC0415

    monkeypatch.syspath_prepend(place)
    assert build_encoder(EncoderConfig("mypackage.models:build"), seed=0).features == 64


def test_a_registered_name_is_found_and_has_to_build_an_encoder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbyol.model.parts import build_encoder  # noqa: PLC0415

    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(registry.ENCODERS, "_parts", dict(registry.ENCODERS))
    registry.ENCODERS.register("small", "mypackage.encoder:build")
    assert build_encoder(EncoderConfig("small", width=2), seed=0).features == 64
    registry.ENCODERS.register("rate", "fastbyol.schedule:learning_rate")
    with pytest.raises(ConfigError, match="encoder 'rate' cannot be called as"):
        build_encoder(EncoderConfig("rate"), seed=0)
