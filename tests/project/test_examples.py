"""Laws of the examples: each runs as its first lines say; the shell scripts call what exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastbyol.cli.train import build_parser
from fastbyol.data_prep import demo
from fastbyol.export import save_encoder
from fastbyol.model.parts import build_encoder
from fastbyol.recipes import named
from tests.conftest import Betons
from tests.support.commands import PATIENCE_S

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *asked: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, asked)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout


@pytest.mark.slow
def test_training_from_python_prints_its_result(betons: Betons, tmp_path: Path) -> None:
    said = run("train.py", betons.train, betons.val, tmp_path / "run", "20s")
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


@pytest.mark.slow
def test_photographs_become_a_map(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "2026").mkdir(parents=True)
    for number, image in enumerate(demo.draw(70, seed=0, split="train")[0]):
        Image.fromarray(image).save(photos / ("2026" if number % 2 else ".") / f"{number}.png")
    said = run("photographs.py", photos, tmp_path / "out", "30s", "demo+batch_size=16")
    assert re.search(r"RankMe [\d.]+ -> [\d.]+ after [\d.]+ epochs\n", said)
    assert {"map.html", "run", "vectors.npz", "vectors.duplicates.csv"} <= {
        x.name for x in (tmp_path / "out").iterdir()
    }
    assert "../map.html" in (tmp_path / "out" / "run" / "report.html").read_text()


@pytest.mark.slow
def test_an_encoder_of_ones_own_is_trained(betons: Betons, tmp_path: Path) -> None:
    said = run("own_encoder.py", betons.train, betons.val, tmp_path / "run", "30s")
    assert re.search(r"kNN [\d.]+ % -> [\d.]+ %\n$", said)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["encoder"]["arch"] == "own_encoder:build"
    )


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_the_cells_of_a_notebook_run_in_order(path: Path, tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert '"60s"' in code
    (tmp_path / "cells.py").write_text(code.replace('"60s"', '"45s"'))
    places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, tmp_path / "cells.py"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"kNN top-1 [\d.]+ % -> [\d.]+ %\nRankMe [\d.]+ -> ", ended.stdout)
    assert "have a nearest neighbour of their own class" in ended.stdout
    assert (tmp_path / "runs" / "first-steps" / "map.html").is_file()


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_scripts_give_flags_that_exist(name: str) -> None:
    text = (EXAMPLES / name).read_text().replace("\\\n", " ")
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)
    command = next(line for line in text.split("\n") if "fastbyol-train" in line)
    words = command.partition("fastbyol-train")[2].removesuffix("&").split()
    args = build_parser().parse_args(words)
    assert args.resume
