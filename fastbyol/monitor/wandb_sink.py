"""Weights & Biases as a sink of a run's rows; the package wandb is optional."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

from fastbyol.errors import ConfigError
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder

PACKAGE = "wandb"
UPLOAD_S = 8.0  # limit of wandb's own process on uploading the rest, also when ours exits
FINISH_S = 10.0  # limit of our wait for it: budgets and SIGTERM need an end


def require_wandb(package: str = PACKAGE) -> None:
    """Raise ConfigError unless the package is installed, without importing it."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--wandb needs the package {package}; pip install 'fastbyol[wandb]', or leave --wandb out")


def run_id(folder: Path, *, is_new: bool) -> str:
    """Return the W&B run id of a run folder: a fresh one for a new run, else the one stored in the folder.

    Two folders of one name are two runs. Raises OSError where the folder cannot be written.
    """
    path = RunFolder(folder).wandb_id
    stored = path.read_text().strip() if path.is_file() and not is_new else ""
    if not stored:
        stored = secrets.token_hex(8)
        files.write(path, stored + "\n")
    return stored


class WandbRun:
    """A run of a W&B project, as a sink of rows; WANDB_MODE=offline, wandb's own switch, keeps them in `folder`/wandb.

    settings: shown as the run's configuration; name: shown as its name. With `is_new` False the run of the same folder
    is continued. Raises ConfigError where wandb is missing, too old or does not start (no login, no network); OSError
    where the folder cannot be written.
    """

    def __init__(self, project: str, *, folder: Path, name: str, settings: dict[str, Any], is_new: bool) -> None:
        require_wandb()
        self._wandb: Any = importlib.import_module(PACKAGE)
        self._has_warned = False
        if "finish_timeout" not in self._wandb.Settings.model_fields:
            raise ConfigError(
                f"wandb {self._wandb.__version__} has no finish_timeout and could keep the run from ending; wanted a "
                "newer version; pip install -U 'fastbyol[wandb]', or leave --wandb out"
            )
        own_id = run_id(folder, is_new=is_new)
        try:
            self._run = self._wandb.init(
                project=project,
                dir=str(folder),
                id=own_id,
                name=name,
                resume="allow",
                config=settings,
                settings=self._wandb.Settings(
                    console="off",  # the progress bar stays the terminal's
                    finish_timeout=UPLOAD_S,
                    finish_timeout_raises=True,
                ),
            )
            self._run.define_metric("*", step_metric="step")  # a resumed run takes some steps again
        except (self._wandb.Error, OSError, ValueError) as error:
            raise ConfigError(
                f"wandb does not start: {error}; run wandb login, or set WANDB_MODE=offline, or leave --wandb out"
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Send one row; print the first failure on stderr and raise none."""
        try:
            self._run.log({name: value for name, value in row.items() if isinstance(value, int | float)})
        except (self._wandb.Error, OSError) as error:
            if not self._has_warned:
                print(f"warning: wandb does not accept rows ({error}); metrics.jsonl holds them", file=sys.stderr)
            self._has_warned = True

    def close(self) -> None:
        """Finish the run: wait at most FINISH_S for wandb to send the remaining rows or, offline, to write them."""
        failures: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except (self._wandb.Error, OSError) as error:  # wandb's own timeout included
                failures.append(error)

        thread = threading.Thread(
            target=finish, name="wandb finish", daemon=True
        )  # a daemon, so that exit does not wait for it
        thread.start()
        thread.join(FINISH_S)
        if thread.is_alive():
            failures.append(TimeoutError(f"it took more than {FINISH_S:g} s"))
        for error in failures:
            print(f"warning: wandb did not finish ({error}); metrics.jsonl holds every row", file=sys.stderr)
