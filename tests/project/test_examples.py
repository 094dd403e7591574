"""Laws of the examples: each runs as its first lines say; the shell scripts call what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.cli.train import build_parser
from fastbyol.export import save_encoder
from fastbyol.parts import build_encoder
from fastbyol.recipes import named
from tests.conftest import Betons

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *asked: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, asked)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


@pytest.mark.slow
def test_training_from_python_prints_its_result(betons: Betons, tmp_path: Path) -> None:
    said = run("train.py", betons.train, betons.val, tmp_path / "run", "11s")
    assert re.fullmatch(r"kNN [\d.]+ % -> [\d.]+ % after [\d.]+ epochs\n", said)


@pytest.mark.slow
def test_a_loop_of_ones_own_learns(betons: Betons) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("own_loop.py", betons.train, 11))]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_network_of_ones_own_learns() -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("own_network.py", 10))]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_runs_encoder_is_fine_tuned(betons: Betons, tmp_path: Path) -> None:
    config = named("demo").encoder
    save_encoder(tmp_path / "encoder.safetensors", build_encoder(config, seed=0), config)
    said = run("finetune.py", tmp_path, betons.train, betons.val, 41)
    losses, top1 = re.findall(r"loss ([\d.]+)", said), re.search(r"top-1 ([\d.]+) %\n$", said)
    assert len(losses) == 3
    assert float(losses[-1]) < float(losses[0])
    assert top1
    assert float(top1[1]) > 20  # of ten classes


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_scripts_give_flags_that_exist(name: str) -> None:
    text = (EXAMPLES / name).read_text().replace("\\\n", " ")
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)
    command = next(line for line in text.split("\n") if "fastbyol-train" in line)
    words = command.partition("fastbyol-train")[2].removesuffix("&").split()
    args = build_parser().parse_args(words)
    assert args.resume
