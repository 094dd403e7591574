"""A small run of the demo recipe that tests start in their own process or another, and what it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons


def arguments(betons: Betons, out: Path, *more: str) -> list[str]:
    """Give the arguments of a small run, in the same precision on any CPU; `more` come last."""
    machine = ("--device=cpu", "--precision=float32")
    return ["demo", f"--data={betons.train}", f"--out={out}", "--batch-size=32", "--log-every=1", *machine, *more]


def encoders_are_equal(a: Path, b: Path) -> bool:
    """Return whether two runs ended with the same bits."""
    first, second = (load_file(RunFolder(out).encoder) for out in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def learned(out: Path) -> list[dict[str, Any]]:
    """Give the rows of a run without what the clock wrote into them."""
    timed = (
        "elapsed_s",
        "images_per_s",
        "interval_s",
        "cpu_s",
        "loader_wait_s",
        "loader_wait_share",
        "views_s",
        "step_s",
        "agree_s",
        "log_s",
        "score_s",
        "checkpoint_s",
        "peak_gib",
        "mfu",
        "warnings",
    )
    return [{name: row[name] for name in row if name not in timed} for row in read_metrics(RunFolder(out).metrics)]
