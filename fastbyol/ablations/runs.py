"""Runs of one cell of a table with one seed, each in its own process, and their results."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbyol.ablations.paper import Cell
from fastbyol.errors import ConfigError
from fastbyol.evaluate import linear
from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import load_scores
from fastbyol.system.command_line import BAD_INPUT, DIVERGED, DONE, INTERRUPTED
from fastbyol.system.shell import operand

POLL_S = 5.0  # not shorter: each poll reads every row of the run


class RunCrashed(RuntimeError):
    """The process of a cell that was killed or ended with an unexpected status."""


@dataclass(frozen=True)
class Job:
    """One run of a table: its cell, seed and folder, and the arguments of its fastbyol-train."""

    cell: Cell
    seed: int
    path: Path
    arguments: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.path)

    @property
    def log(self) -> Path:
        """The file with the output of the run's process."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def record(self) -> Path:
        """The file with the exit status of the run; it exists once the run has ended."""
        return self.path.with_name(f"{self.path.name}.json")


@dataclass(frozen=True)
class RunResult:
    """How a run ended: exit status 0 or 3, and scores in percent, None where there is none.

    last_line: the run's last line of output if it diverged. linear_top1: of a linear classifier on cached
    representations. scaled_std: the last embedding std times the root of D, the projection size.
    """

    status: int
    last_line: str = ""
    knn_top1: float | None = None
    knn_top1_random_init: float | None = None
    linear_top1: float | None = None
    scaled_std: float | None = None


def read_result(job: Job) -> RunResult | None:
    """Read the result of a run, None if it has not ended; raise ConfigError if another run is in its place."""
    if not job.record.is_file():
        return None
    try:
        record = json.loads(job.record.read_text())
        arguments, status, last_line = tuple(record["words"]), record["status"], record["told"]
        result = json.loads(job.folder.result.read_text()) if status == DONE else {}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{job.record} is not a valid record ({error}); remove it to repeat the run") from error
    if arguments != job.arguments:
        raise ConfigError(
            f"{job.path} was made by fastbyol-train {' '.join(arguments)}; wanted {' '.join(job.arguments)}; "
            "give the old settings, or another --out"
        )
    rows = read_metrics(job.folder.metrics)
    root = math.sqrt(job.folder.read_config().recipe.head.out)
    return RunResult(
        status,
        last_line,
        knn_top1=result.get("knn_top1"),
        knn_top1_random_init=result.get("knn_top1_random_init"),
        linear_top1=_linear_top1(job),
        scaled_std=root * rows[-1]["embedding_std"] if rows else None,
    )


def _linear_top1(job: Job) -> float | None:
    """Read the score that score_linear saved for the job's own files, if there is one."""
    wanted = {"protocol": "linear", "views": "cached", "epochs": linear.EPOCHS, "seed": 0}
    for scores in load_scores(job.folder):
        own = {f"--data={scores['train']}", f"--val={scores['val']}"} <= set(job.arguments)
        if own and wanted.items() <= {name: scores.get(name) for name in wanted}.items():
            top1: float = scores["trained"]["top1"]
            return top1
    return None


def train_run(job: Job, *, on_progress: Callable[[float], None]) -> None:
    """Run or resume fastbyol-train for a job and record its exit status; call `on_progress` with progress in [0, 1].

    Raises ConfigError with the run's own error line for bad input, RunCrashed if the process was killed or failed, and
    KeyboardInterrupt if a signal stopped it or this process; the run has then written a checkpoint.
    """
    job.path.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if job.folder.config.exists() else []
    status = _run(job, ["fastbyol.train", *job.arguments, f"--out={job.path}", *resume], on_progress)
    # these keys are a format: a table that an older version began is continued
    record = {"words": job.arguments, "status": status, "told": _last_line(job.log) if status == DIVERGED else ""}
    files.write(job.record, json.dumps(record, indent=2) + "\n")


def score_linear(job: Job, *, on_progress: Callable[[float], None]) -> None:
    """Run fastbyol-eval linear on the encoder of a job; the score is saved in the run folder. Raises like train_run."""
    config = job.folder.read_config()
    arguments = [
        "linear",
        operand(job.path),
        f"--train={config.data}",
        f"--val={config.val}",
        "--cached",
        "--skip-random-init",
    ]
    _run(job, ["fastbyol.eval", *arguments, f"--device={config.device}", f"--workers={config.workers}"], on_progress)


def _run(job: Job, arguments: Sequence[str], on_progress: Callable[[float], None]) -> int:
    """Run a module with arguments and return its exit status, 0 or 3; raise like train_run."""
    with job.log.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only this process, which then stops the run once
        )
        try:
            status = _wait(process, job, on_progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    last_line = _last_line(job.log)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status == BAD_INPUT:
        raise ConfigError(last_line.removeprefix("fastbyol-train: error: ").removeprefix("fastbyol-eval: error: "))
    if status not in (DONE, DIVERGED):
        raise RunCrashed(f"{job.cell.name}, seed {job.seed}, ended with status {status}: {last_line}; see {job.log}")
    return status


def _wait(process: subprocess.Popen[bytes], job: Job, on_progress: Callable[[float], None]) -> int:
    """Wait for the run to end; on the first Ctrl-C send it SIGTERM, so that it writes a checkpoint."""
    try:
        while True:
            try:
                return process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                rows = read_metrics(job.folder.metrics)
                on_progress(rows[-1]["progress"] if rows else 0.0)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
    return lines[-1].strip() if lines else "no output"
