"""Parts from outside the package: the examples of docs/extending.md train, resume and are scored by the commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol import registry
from fastbyol.cli import eval as evaluation
from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.export import load_encoder
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


@pytest.mark.parametrize("loss", ["mypackage:none:Loss", "cosine"])
def test_a_loss_of_no_known_form_is_refused_with_the_choices(loss: str) -> None:
    from fastbyol.recipes import named  # noqa: PLC0415

    choices = "choose one of byol, vicreg, coding-rate, or give your own as module:attribute"
    with pytest.raises(ConfigError, match=f"no objective .*; {choices}"):
        named(f"demo+loss={loss}")


def test_a_network_of_no_known_form_becomes_an_encoder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbyol.parts import build_encoder  # noqa: PLC0415

    monkeypatch.syspath_prepend(place)
    assert build_encoder(EncoderConfig("mypackage.models:build"), seed=0).features == 64


def test_a_registered_name_is_found_and_has_to_build_an_encoder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbyol.parts import build_encoder  # noqa: PLC0415

    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(registry.ENCODERS, "_parts", dict(registry.ENCODERS))
    registry.ENCODERS.register("small", "mypackage.encoder:build")
    assert build_encoder(EncoderConfig("small", width=2), seed=0).features == 64
    registry.ENCODERS.register("rate", "fastbyol.schedule:learning_rate")
    with pytest.raises(ConfigError, match="encoder 'rate' cannot be called as"):
        build_encoder(EncoderConfig("rate"), seed=0)
