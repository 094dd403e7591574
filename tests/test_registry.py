"""Laws of parts by name: what is named is found, also in the folder that a command is started in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastbyol.errors import ConfigError
from fastbyol.registry import LOADERS


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
