"""Know Weights & Biases as a place for a run's rows: an optional package, probed by import."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

from fastbyol import atomic
from fastbyol.config import ConfigError

PACKAGE = "wandb"
UPLOAD_S = 8.0  # that wandb's own process may take for what it still holds, also when ours exits
FINISH_S = 10.0  # that ours waits for it: budgets and SIGTERM count on an end


def require_wandb(package: str = PACKAGE) -> None:
    """Raise ConfigError unless the package is installed; it is not imported."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--wandb needs the package {package}; pip install 'fastbyol[wandb]', or leave --wandb out")


def run_id(folder: Path, *, is_new: bool) -> str:
    """Give the id by which W&B knows the run of a folder: a fresh one for a new run, else the one kept in the folder.

    Two folders of one name are two runs. Raises OSError where the folder cannot keep it.
    """
    path = folder / "wandb-id"
    known = path.read_text().strip() if path.is_file() and not is_new else ""
    if not known:
        known = secrets.token_hex(8)
        atomic.write(path, known + "\n")
    return known


class WandbRun:
    """Send rows to one run of a W&B project; WANDB_MODE=offline, wandb's own switch, keeps them in `folder`/wandb.

    settings: what W&B shows as the run's configuration. name: what it shows as the run's name. With `is_new` False the
    run of the same folder is continued. Raises ConfigError where wandb is missing, too old or refuses to start (no
    login, no network); OSError where the folder takes no files.
    """

    def __init__(self, project: str, *, folder: Path, name: str, settings: dict[str, Any], is_new: bool) -> None:
        require_wandb()
        self._wandb: Any = importlib.import_module(PACKAGE)
        self._warned = False
        if "finish_timeout" not in self._wandb.Settings.model_fields:
            raise ConfigError(
                f"wandb {self._wandb.__version__} could keep a run from ending; pip install -U 'fastbyol[wandb]', "
                "or leave --wandb out"
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
        """Send one row; the first failure is told on stderr, none ends the training."""
        try:
            self._run.log({name: value for name, value in row.items() if isinstance(value, int | float)})
        except (self._wandb.Error, OSError) as error:
            if not self._warned:
                print(f"warning: wandb takes no rows ({error}); metrics.jsonl has them", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        """Finish the run: wait, FINISH_S at most, until wandb has sent what it holds, or written it where offline."""
        failures: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except (self._wandb.Error, OSError) as error:  # of wandb's own timeout, too
                failures.append(error)

        thread = threading.Thread(target=finish, name="wandb finish", daemon=True)  # which no exit waits for
        thread.start()
        thread.join(FINISH_S)
        if thread.is_alive():
            failures.append(TimeoutError(f"it took more than {FINISH_S:g} s"))
        for error in failures:
            print(f"warning: wandb did not finish ({error}); metrics.jsonl has every row", file=sys.stderr)
