"""Training from Python: `run` trains in a folder, as fastbyol-train does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbyol.budget import Stopwatch
from fastbyol.config import Config
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.signals import StopSignal


def run(config: Config, out: Path | str, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Train in folder `out`; return the content of result.json, or None when a signal stopped the run.

    A budget counts from this call. Raises the errors that fastbyol-train would print: ConfigError, BetonError,
    CheckpointError, OSError, watchdog.Diverged.
    """
    from fastbyol.train.runner import run as run_training  # noqa: PLC0415 - it imports torch, and --help needs none

    folder, stopwatch, stop = RunFolder(Path(out)), Stopwatch(age_s=0.0), StopSignal()
    with stop.catch():
        if not run_training(config, folder, stopwatch=stopwatch, stop=stop, resume=resume, overwrite=overwrite):
            return None
    return folder.read_result()
