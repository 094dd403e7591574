"""Laws of parts by name: what is named is found, also in the folder that a command is started in."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastbyol.cli.train import main
from fastbyol.errors import ConfigError
from fastbyol.registry import LOADERS
from tests.conftest import Betons
from tests.support.runs import arguments


def test_a_module_beside_the_user_is_found_and_hides_none_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_part_of_mine.py").write_text("answer = 42\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])  # as of a console command
    monkeypatch.delitem(sys.modules, "json", raising=False)
    assert LOADERS.find("a_part_of_mine:answer") == 42
    assert callable(LOADERS.find("json:loads"))
    with pytest.raises(ConfigError, match=r"'none_of_mine:x' cannot be imported .* in this folder or on PYTHONPATH"):
        LOADERS.find("none_of_mine:x")


def test_a_part_of_ones_own_takes_no_name_that_is_taken() -> None:
    with pytest.raises(ConfigError, match="a second loader named 'memory'"):
        LOADERS.register("memory", "mine:load")
    with pytest.raises(ConfigError, match="give it as module:attribute"):
        LOADERS.register("mine", "no target")


PARTS = """
import torch
from fastbyol.model.parts import Encoder


class Featureless(Encoder):
    def __init__(self, config, *, seed, views):
        super().__init__()
        self.config = config


def nothing():
    pass


def one(given):
    pass


def none(*given, **more):
    pass


def torchs(module, target_of, config):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def numbers(reader, batches, **settings):
    yield 5


def silent(reader, batches, **settings):
    yield from ()


def listed(reader, batches, **settings):
    return []
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("+arch=ill:one", r"encoder 'ill:one' cannot be called as \(\.\.\., seed=\.\.\., views=\.\.\.\): "),
        ("+arch=ill:nothing", "encoder 'ill:nothing' built a NoneType; return a torch.nn.Module"),
        ("+arch=ill:none", "encoder 'ill:none' built a NoneType; return a torch.nn.Module"),
        ("+arch=ill:Featureless", "encoder 'ill:Featureless' has no features; set it to the int"),
        ("+loss=ill:nothing", "objective 'ill:nothing' cannot be called as"),
        ("+loss=ill:none", "objective 'ill:none' built a NoneType; return a torch.nn.Module"),
        ("--optimizer=ill:nothing", "optimizer 'ill:nothing' cannot be called as"),
        ("--optimizer=ill:torchs", "built a SGD without is_capturable, skips_bad_steps, skipped, tau, set_rates; see"),
        ("--loader=ill:nothing", "loader 'ill:nothing' cannot be called as"),
        ("--loader=ill:numbers", "loader 'ill:numbers' yielded a int; yield a fastbyol.loaders.Batch"),
        ("--loader=ill:silent", "loader 'ill:silent' ended, but there are more rows"),
        ("--loader=ill:listed", "loader 'ill:listed' returned a list; write it as a generator"),
    ],
)
def test_a_part_of_another_form_is_told_its_form(
    change: str,
    expected: str,
    betons: Betons,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ill.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ill", raising=False)
    recipe, more = ("demo", (change,)) if change.startswith("-") else (f"demo{change}", ())
    asked = arguments(betons, tmp_path / "run", "--epochs=1", "--warmup-epochs=0", *more)
    assert main([recipe, *asked[1:]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(expected, said), said
