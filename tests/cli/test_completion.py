"""Laws of completion: bash offers the words that a command takes at that place."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastbyol.__main__ import main
from fastbyol.cli.completion import script
from fastbyol.data_prep.cli import build_parser
from fastbyol.recipes import RECIPES

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_fastbyol
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "fastbyol.bash"
    path.write_text(script("bash", build_parser()))
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fastbyol-train", ""], set(RECIPES)),
        (["fastbyol-train", "cifar100"], {"cifar100_rn18"}),
        (["/env/bin/fastbyol-train", "demo", "--see"], {"--seed"}),
        (["fastbyol-train", "demo", "--engine", ""], {"eager", "graph", "compile"}),
        (["fastbyol-train", "demo", "--out", ""], set()),  # a path
        (["fastbyol-train", "demo", ""], set()),
        (["fastbyol-eval", "s"], {"semi", "segment"}),
        (["fastbyol-eval", "semi", "run", "--frac"], {"--fraction"}),
        (["fastbyol-eval", "export", "run", "f", "--format", "ti"], {"timm"}),
        (["fastbyol-prep", ""], {"write", "verify", "info", "demo"}),
        (["fastbyol-prep", "write", "--on-error", "sk"], {"skip"}),
        (["fastbyol-embed", "run", "--neigh"], {"--neighbours"}),
    ],
)
def test_bash_offers_what_the_command_takes(words: list[str], offered: set[str], written: Path) -> None:
    asked = subprocess.run(["bash", "-c", ASK, "bash", written, *words], capture_output=True, text=True, check=True)
    assert asked.stderr == ""
    assert set(asked.stdout.split()) == offered


def test_the_script_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "zsh"]) == 0
    said = capsys.readouterr().out
    assert "bashcompinit" in said
    assert "complete -o bashdefault -o default -F _fastbyol fastbyol-train" in said
