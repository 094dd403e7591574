"""Know how a run survives: checkpoints written atomically, the two newest kept, the newest readable one loaded."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from fastbyol import atomic

KEPT = 2
NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(ValueError):
    """Tell the user that no checkpoint of a run can be loaded, and what to do."""


def _steps(folder: Path) -> list[tuple[int, Path]]:
    matches = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*.pt"))
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def exists(folder: Path) -> bool:
    """Tell whether any checkpoint was written, readable or not."""
    return bool(_steps(folder))


def save(folder: Path, state: dict[str, Any], *, step: int) -> Path:
    """Write `state` as checkpoint `step`; keep it and the one before, drop all others.

    The file appears under its name only when it is complete and on disk. Raises OSError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:09d}.pt"
    try:
        with atomic.replacing(final) as file:
            torch.save(state, file)
    except RuntimeError as error:  # how torch's archive writer reports a failed write
        raise OSError(f"{final} cannot be written: {str(error).partition(chr(10))[0]}; is the disk full?") from error
    older = [path for number, path in _steps(folder) if number < step]
    later = [path for number, path in _steps(folder) if number > step]  # damaged, else the run would stand there
    for path in (*older[: 1 - KEPT], *later):
        path.unlink()
    return final


def load_newest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Load the newest checkpoint that reads, with one line for each newer one that did not.

    Only tensors and plain values are unpickled (weights_only). Raises CheckpointError when none reads.
    """
    damaged: list[str] = []
    for _, path in reversed(_steps(folder)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state, damaged
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            damaged.append(f"{path} does not load ({reason}); trying the one before")
    said = f": {damaged[0]}" if damaged else ""
    raise CheckpointError(f"{folder} holds no checkpoint to resume from{said}; start anew without --resume")
