"""A small run of the demo recipe that tests start in their own process or another, and what it trained."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons


def arguments(betons: Betons, out: Path, *more: str) -> list[str]:
    """Give the arguments of a small run; `more` come last."""
    return ["demo", f"--data={betons.train}", f"--out={out}", "--batch-size=32", "--log-every=1", "--device=cpu", *more]


def encoders_are_equal(a: Path, b: Path) -> bool:
    """Return whether two runs ended with the same bits."""
    first, second = (load_file(RunFolder(out).encoder) for out in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
