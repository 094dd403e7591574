"""Know Weights & Biases as a place for a run's rows: an optional package, probed by import."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from fastbyol.config import ConfigError

PACKAGE = "wandb"


def check_installed(package: str = PACKAGE) -> None:
    """Raise ConfigError unless the package is installed; it is not imported."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--wandb needs the package {package}; pip install 'fastbyol[wandb]', or leave --wandb out")


class WandbRun:
    """Send rows to one run of a W&B project; WANDB_MODE=offline, wandb's own switch, keeps them in `folder`/wandb.

    settings: what W&B shows as the run's configuration. name: the run's id and name; a run of the same name is
    continued. Raises ConfigError where wandb is missing or refuses to start (no login, no network).
    """

    def __init__(self, project: str, *, folder: Path, name: str, settings: dict[str, Any]) -> None:
        check_installed()
        self._wandb: Any = importlib.import_module(PACKAGE)
        self._warned = False
        try:
            self._run = self._wandb.init(
                project=project,
                dir=str(folder),
                id=name,
                name=name,
                resume="allow",
                config=settings,
                settings=self._wandb.Settings(console="off"),  # the progress bar stays the terminal's
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
        """Finish the run: waits until wandb has sent what it holds, or has written it where it is offline."""
        try:
            self._run.finish()
        except (self._wandb.Error, OSError) as error:
            print(f"warning: wandb did not finish ({error}); metrics.jsonl has every row", file=sys.stderr)
