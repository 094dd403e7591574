"""Laws of start-up: help, tables, versions and wrong words are answered before torch and numpy are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastbyol
from tests.support.commands import PATIENCE_S

HEAVY = ("torch", "numpy", "matplotlib", "PIL", "triton")
# Run one command line in a fresh process, then print what it imported.
PROBE = """
import importlib, json, sys
module, *words = sys.argv[1:]
try:
    status = importlib.import_module(module).main(words)
except SystemExit as error:
    status = error.code
print(json.dumps([status or 0, sorted(sys.modules)]))
"""


def answer(module: str, *words: str) -> tuple[int, str, str, set[str]]:
    """Return the exit status of a command line, its output and errors, and the heavy modules that it imported."""
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, module, *words], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    said, last = ended.stdout.rstrip("\n").rpartition("\n")[::2]
    status, modules = json.loads(last)
    return status, said, ended.stderr, set(modules) & set(HEAVY)


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("fastbyol.cli.train", "--help", "--budget TIME"),
        ("fastbyol.cli.train", "--recipes", "imagenet_rn50x4_e1000"),
        ("fastbyol.cli.train", "--settings", "hue = 0.1"),
        ("fastbyol.cli.train", "cifar10_tiny --settings", "hue = 0.05"),
        ("fastbyol.cli.train", "--version", f"fastbyol-train {fastbyol.__version__}"),
        ("fastbyol.cli.eval", "--help", "semantic segmentation"),
        ("fastbyol.cli.eval", "export --help", "detectron2"),
        ("fastbyol.cli.eval", "table --help", "learning_rate"),
        ("fastbyol.cli.eval", "--version", f"fastbyol-eval {fastbyol.__version__}"),
        ("fastbyol.cli.embed", "--help", "goes on where it was"),
        ("fastbyol.cli.embed", "--version", f"fastbyol-embed {fastbyol.__version__}"),
        ("fastbyol.__main__", "", "fastbyol-prep"),
        ("fastbyol.__main__", "--version", f"fastbyol {fastbyol.__version__}"),
    ],
)
def test_questions_are_answered_without_torch_or_numpy(module: str, words: str, said: str) -> None:
    status, output, _, heavy = answer(module, *words.split())
    assert (status, heavy) == (0, set())
    assert said in output


@pytest.mark.parametrize("command", ["train", "eval", "embed"])
def test_a_module_answers_as_its_command_does(command: str) -> None:
    asked = [sys.executable, "-X", "importtime", "-m", f"fastbyol.{command}", "--help"]
    ended = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.split("\n")}
    assert f"usage: fastbyol-{command}" in ended.stdout
    assert "fastbyol.system.command_line" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("fastbyol.cli.train", "imagenet_r50", "no recipe is named 'imagenet_r50'; give one"),
        ("fastbyol.cli.train", "demo+colour=1", "'colour=1' is not a setting; give setting=value"),
        ("fastbyol.cli.train", "demo --bugdet 8h", "the nearest flag is --budget"),
        ("fastbyol.cli.train", "demo --labels none", "of fastbyol-prep write: give it as --prep '--labels none'"),
        ("fastbyol.cli.train", "demo --budget 8", "'8' is not a duration; give"),
        ("fastbyol.cli.train", "demo --checkpoint-every 8", "--checkpoint-every '8' is not a duration; give"),
        ("fastbyol.cli.train", "demo --loader nativ", "no loader 'nativ'; choose one of native, memory, ffcv, dali"),
        ("fastbyol.cli.train", "demo --engine eagre", "choose from"),
        ("fastbyol.cli.train", "", "required: RECIPE"),
        ("fastbyol.cli.train", "--config nothing.toml", "nothing.toml: No such file or directory; check the path"),
        ("fastbyol.cli.eval", "", "no protocol given; give one"),
        ("fastbyol.cli.eval", "knnn run", "no protocol 'knnn'; give one of knn, linear"),
        ("fastbyol.cli.eval", "mine:PROTOCOL run", "'mine:PROTOCOL' cannot be imported"),
        ("fastbyol.cli.eval", "json:dumps run", "json:dumps is a function; give a fastbyol.evaluate.protocol.Protocol"),
        ("fastbyol.cli.eval", "export run", "required: OUT"),
        ("fastbyol.cli.embed", "run photos", "required: --out"),
        ("fastbyol.cli.embed", "run photos --out v.txt", "'v.txt' given; wanted a name that ends in .parquet, .npz"),
        ("fastbyol.cli.embed", "run photos --out v.npy --margin 2", "'2' given; wanted a number above 0 and at most 1"),
        ("fastbyol.cli.embed", "run photos --out v.npy --map map.png", "wanted a name that ends in .html"),
        ("fastbyol.cli.embed", "run photos --out v.npy --layout tsne", "--layout tsne is given without --map"),
        ("fastbyol.cli.eval", "table tarjet --base demo --data d --val v", "choose from"),
    ],
)
def test_wrong_words_are_answered_in_one_line_without_torch_or_numpy(module: str, words: str, said: str) -> None:
    status, output, errors, heavy = answer(module, *words.split())
    assert (status, output, heavy) == (2, "", set())
    assert said in errors
    assert errors.count("\n") == 1


def test_help_of_a_protocol_imports_no_other() -> None:
    probe = """
import sys
from fastbyol.cli.eval import parse
try:
    parse(["knn", "--help"])
except SystemExit:
    others = ("linear", "semi_supervised", "linear_transfer", "finetune", "segmentation")
    sys.exit(any(f"fastbyol.evaluate.{name}" in sys.modules for name in others))
"""
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("words", ["write --help", "write nothing out.beton"])
def test_without_an_address_nothing_of_the_network_is_imported(words: str) -> None:
    code = f"""
import sys
from fastbyol.data_prep.cli import main
try:
    main({words.split()!r})
except SystemExit:
    pass
sys.exit(any(name in sys.modules for name in ("fsspec", "aiohttp", "asyncio.runners", "ssl")))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=PATIENCE_S)


def test_the_version_of_a_tree_that_is_not_installed_is_that_of_its_project(tmp_path: Path) -> None:
    package = Path(fastbyol.__file__).parent
    (tmp_path / "fastbyol").mkdir()
    (tmp_path / "fastbyol" / "__init__.py").write_text((package / "__init__.py").read_text())
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fastbyol"\nversion = "7.8.9"\n')
    probe = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastbyol; print(fastbyol.__version__)"
    command = [sys.executable, "-I", "-S", "-c", probe]  # without site-packages
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "7.8.9\n"
