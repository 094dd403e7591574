"""Laws of protocols: everyone's own is found by module:attribute, scored, saved and summarised like ours."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.cli.eval import find_protocol
from fastbyol.evaluate.protocol import Protocol
from fastbyol.registry import PROTOCOLS
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import load_scores
from tests.conftest import Betons
from tests.support.commands import PATIENCE_S, TRAIN, arguments, start

OWN = """
import torch

from fastbyol.errors import require
from fastbyol.evaluate.features import represent_both
from fastbyol.evaluate.protocol import Protocol


def add_arguments(parser):
    parser.add_argument("--shift", type=int, default=0, metavar="N", help="added to each label")


def prepare(args, files, inputs):
    require(args.shift >= 0, f"shift is {args.shift}; give at least 0")

    def job(encoder, label):
        bank, queries = represent_both(encoder, files, inputs)
        means = torch.stack([bank.values[bank.labels == c].mean(0) for c in bank.labels.unique()])
        nearest = torch.cdist(queries.values, means).argmin(1)
        hits = (queries.labels + args.shift == nearest).float().mean()
        return {"top1": 100 * float(hits), "label": label}

    return {"shift": args.shift}, job


MEANS = Protocol(add_arguments, prepare)
ALONE = Protocol(add_arguments, prepare, scores_baseline=lambda args: False)
BARE = Protocol(
    lambda parser: None,
    lambda args, files, inputs: ({"train": "a", "val": "b"}, lambda encoder, label: {"miou": 50.0, "files": files}),
    has_files=False,
    baseline="supervised",
)
"""


@pytest.fixture(scope="module")
def run(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one epoch."""
    out = tmp_path_factory.mktemp("protocol") / "run"
    process = start(*TRAIN, *arguments(betons, out, "--epochs=1"))
    assert process.wait(PATIENCE_S) == 0, process.communicate()
    return out


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a package with protocols outside of fastbyol."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "mine").mkdir()
    (folder / "mine" / "__init__.py").touch()
    (folder / "mine" / "means.py").write_text(OWN)
    return folder


def evaluate(modules: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run fastbyol-eval as a process with the user's modules on its path."""
    path = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, env = [sys.executable, "-m", "fastbyol.eval", *map(str, words)], os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=PATIENCE_S)


def test_a_protocol_of_ones_own_scores_both_encoders(betons: Betons, run: Path, modules: Path) -> None:
    files = [f"--train={betons.train}", f"--val={betons.val}", "--device=cpu"]
    ended = evaluate(modules, "mine.means:MEANS", run, *files, "--shift=1", "--json")
    assert ended.returncode == 0, ended.stderr
    scores = json.loads(ended.stdout)
    assert (scores["protocol"], scores["shift"], scores["train"]) == ("mine.means:MEANS", 1, str(betons.train))
    assert scores["trained"]["label"] == "mine.means:MEANS trained"
    assert scores in load_scores(RunFolder(run))
    assert {"trained", "random_init"} <= scores.keys()


def test_a_protocol_chooses_its_second_encoder(betons: Betons, run: Path, modules: Path) -> None:
    files = [f"--train={betons.train}", f"--val={betons.val}", "--device=cpu"]
    ended = evaluate(modules, "mine.means:ALONE", run, *files)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("mine.means:ALONE top-1: ")
    assert "random init" not in ended.stdout


def test_a_protocol_without_files_names_its_data(run: Path, modules: Path) -> None:
    ended = evaluate(modules, "mine.means:BARE", run, "--device=cpu")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "mine.means:BARE mIoU: 50.00 % trained, 50.00 % supervised from scratch\n"
    assert evaluate(modules, "mine.means:BARE", run, "--train=t").returncode == 2


def test_an_error_of_a_protocol_is_one_line(betons: Betons, run: Path, modules: Path) -> None:
    files = [f"--train={betons.train}", f"--val={betons.val}", "--device=cpu"]
    ended = evaluate(modules, "mine.means:MEANS", run, *files, "--shift=-1")
    assert ended.returncode == 2
    assert ended.stderr == "fastbyol-eval: error: shift is -1; give at least 0\n"


def test_help_of_a_protocol_of_ones_own_lists_its_flags(modules: Path) -> None:
    ended = evaluate(modules, "mine.means:MEANS", "--help")
    assert ended.returncode == 0
    assert "added to each label (default: 0)" in ended.stdout


@pytest.mark.parametrize("name", PROTOCOLS)
def test_our_protocols_have_the_form(name: str) -> None:
    protocol = find_protocol(name)
    assert isinstance(protocol, Protocol)
    parser = argparse.ArgumentParser()
    protocol.add_arguments(parser)
    assert not {"encoder", "json", "device", "threads", "px", "margin"} & {action.dest for action in parser._actions}
