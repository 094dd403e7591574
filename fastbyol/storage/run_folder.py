"""Layout of a run folder, its lock, and the checks before a run may use it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol.config import Config, from_json, to_json
from fastbyol.errors import ConfigError
from fastbyol.storage import files

FREE_ON_RESUME = {  # settings that change no weight of a step
    "budget_s",
    "deadline",
    "device",
    "engine",
    "data",  # the same images may lie elsewhere: the checkpoint tells whether they are the same
    "val",
    "labelled",
    "init",  # a run keeps the weights it began with: train/start.py
    "init_digest",
    "epochs",  # they may grow: check_resumable
    "loader",
    "on_error",
    "workers",
    "threads",
    "prefetch",
    "log_every",
    "checkpoint_s",
    "recomputes",
    "deterministic",
    "knn_bank",
    "knn_at",
    "quality_at",
    "stop_on_collapse",
    "profile",
    "tensorboard",
    "wandb",
}
CLOCKS_DIFFER_S = 1.0  # by which a deadline may seem to have moved
FREE_IN_RECIPE = {"eval_px", "eval_margin"}  # the same, among the recipe's settings


@dataclass(frozen=True)
class RunFolder:
    """The paths in one run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """The rows: one JSON object a line, every log_every steps."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the two newest checkpoints."""
        return self.path / "checkpoints"

    @property
    def encoder(self) -> Path:
        """The online encoder, safetensors, torchvision's names."""
        return self.path / "encoder.safetensors"

    @property
    def report(self) -> Path:
        """The report, one self-contained page."""
        return self.path / "report.html"

    @property
    def result(self) -> Path:
        """The result; it exists only once the run has finished."""
        return self.path / "result.json"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """The folder of the trace of --profile."""
        return self.path / "profile"

    @property
    def scores(self) -> Path:
        """The folder of fastbyol-eval's scores."""
        return self.path / "scores"

    @property
    def splits(self) -> Path:
        """The folder of the label splits that fastbyol-eval semi draws."""
        return self.path / "splits"

    @property
    def earlier(self) -> Path:
        """The folder of what the run had reached when it was made longer: a folder for each time."""
        return self.path / "earlier"

    @property
    def maps(self) -> Path:
        """The list of the maps that fastbyol-embed drew with the run's encoder."""
        return self.path / "maps.json"

    @property
    def wandb_id(self) -> Path:
        """The id of the run at Weights & Biases."""
        return self.path / "wandb-id"

    @property
    def demo_train(self) -> Path:
        """The training images that recipe demo draws itself."""
        return self.path / "data" / "train.beton"

    @property
    def demo_val(self) -> Path:
        """The validation images that recipe demo draws itself."""
        return self.path / "data" / "val.beton"

    @property
    def rehearsal(self) -> RunFolder:
        """The folder in which the closing work is rehearsed; it is removed afterwards, whatever a killed run left."""
        return RunFolder(self.path / ".fastbyol-rehearsal")

    def read_config(self) -> Config:
        """Read the configuration; raise ConfigError when the folder holds no run."""
        if not self.config.is_file():
            raise ConfigError(f"{self.path} holds no run (no config.json); give the --out folder of fastbyol-train")
        try:
            return from_json(self.config.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.config} is not UTF-8; restore it, or give another --out") from error

    def read_result(self) -> dict[str, Any]:
        """Read result.json, the outcome of a finished run: scores in %, seconds and counts by name.

        Raises ConfigError where the file is damaged.
        """
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except ValueError:  # no JSON, or not UTF-8
            result = None
        if not isinstance(result, dict) or "elapsed_s" not in result:
            raise ConfigError(f"{self.result} is damaged; restore it, or remove it and give --resume to fastbyol-train")
        return result


def check_free(folder: RunFolder, *, overwrite: bool) -> None:
    """Raise ConfigError when the folder holds a run that may not be overwritten."""
    if folder.config.exists() and not overwrite:
        raise ConfigError(f"{folder.path} already holds a run; give --resume, --overwrite or another --out")
    in_the_way = [] if overwrite else [path.name for path in _outputs(folder) if path.exists()]
    if in_the_way:
        raise ConfigError(
            f"{folder.path} holds no run, but {', '.join(in_the_way)}, which a new run would remove; give another "
            "--out, or --overwrite"
        )


def _outputs(folder: RunFolder) -> tuple[Path, ...]:
    """Return what a run writes beside its configuration, and a new run in its folder removes."""
    return (
        *(folder.metrics, folder.encoder, folder.report, folder.result, folder.maps),
        *(folder.checkpoints, folder.tensorboard, folder.profile, folder.scores, folder.earlier),
    )


def check_unused(folder: RunFolder, *, overwrite: bool) -> None:
    """Create the folder; raise ConfigError when it holds a run that may not be overwritten."""
    check_free(folder, overwrite=overwrite)
    folder.path.mkdir(parents=True, exist_ok=True)


@contextmanager
def lock(folder: RunFolder) -> Iterator[None]:
    """Lock a run folder against other processes of this machine; raise ConfigError where one holds the lock.

    The lock ends with the process, however that ends. On a file system without locks nothing is locked.
    """
    descriptor = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _flock(descriptor, folder.path)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, path: Path) -> None:
    with suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process trains in {path}; wait until it ends, or give another --out") from None


def initialize(folder: RunFolder, config: Config) -> None:
    """Remove the files of an earlier run, then replace its configuration, by which the folder is known as a run's."""
    for path in _outputs(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    files.write(folder.config, to_json(config))


def set_aside(folder: RunFolder, *, step: int) -> None:
    """Move what a finished run has reached to a run folder of its own: it is finished no more, and none of it is lost.

    The result goes last, so that a run which is killed meanwhile counts as finished, and the move is repeated.
    """
    kept = RunFolder(folder.earlier / f"step-{step:09d}")
    kept.path.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder.config, kept.config)
    if folder.scores.exists() and kept.scores.exists():
        shutil.rmtree(kept.scores)
    for old in (folder.encoder, folder.report, folder.scores, folder.result):
        if old.exists():
            old.replace(kept.path / old.name)


def check_resumable(folder: RunFolder, config: Config) -> None:
    """Raise ConfigError, naming every setting that differs, unless `config` continues the run in the folder."""
    recorded = folder.read_config()
    if config.micro_batches is None:  # not given: as the run started
        config = dataclasses.replace(config, micro_batches=recorded.micro_batches)
    before, now = (dataclasses.asdict(c) for c in (recorded, config))
    for settings in (before, now):
        settings["recipe"] = {name: x for name, x in settings["recipe"].items() if name not in FREE_IN_RECIPE}
    changes = _changes({name: (before[name], now[name]) for name in before if name not in FREE_ON_RESUME})
    if (recorded.epochs is None) != (config.epochs is None):
        kinds = ["a budget" if length is None else f"{length:g} epochs" for length in (recorded.epochs, config.epochs)]
        changes.append(f"the length was {kinds[0]}, is {kinds[1]}")
    elif recorded.epochs is not None and config.epochs is not None and config.epochs < recorded.epochs:
        changes.append(f"epochs was {recorded.epochs:g}, is {config.epochs:g}, and a run can only become longer")
    if changes:
        raise ConfigError(
            f"--resume continues the same run, but {'; '.join(changes)}; give the old settings, or another --out"
        )


def is_longer(config: Config, recorded: Config) -> bool:
    """Tell whether a configuration gives a run more time, or more epochs, than recorded; a length of another kind does.

    Both continue the same run, see check_resumable.
    """
    now, before = ((c.epochs, c.budget_s, c.deadline) for c in (config, recorded))
    slack = (0.0, 0.0, CLOCKS_DIFFER_S)
    pairs = zip(now, before, slack, strict=True)
    return any(new is not None and (old is None or new > old + differ) for new, old, differ in pairs)


def _changes(settings: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Describe the settings whose two values differ, down to the parts of a recipe."""
    found = []
    for name, (before, now) in settings.items():
        if isinstance(before, dict) and isinstance(now, dict):
            found += _changes({part: (before.get(part), now.get(part)) for part in before | now})
        elif _are_tables(before) and _are_tables(now):  # views
            if len(before) != len(now):
                found.append(f"{name} were {len(before)}, are {len(now)}")
            else:
                found += _changes(
                    {f"{name}[{number}]": pair for number, pair in enumerate(zip(before, now, strict=True))}
                )
        elif before != now:
            found.append(f"{name} was {before}, is {now}")
    return found


def _are_tables(value: Any) -> bool:
    """Return whether a setting is a list of tables."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, dict) for each in value)


def write_result(folder: RunFolder, result: dict[str, Any]) -> None:
    """Write result.json atomically: where it exists, the run has finished."""
    files.write(folder.result, json.dumps(result, indent=2) + "\n")
