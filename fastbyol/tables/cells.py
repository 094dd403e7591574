"""Know how one cell of a table is run with one seed: in a process of its own, resumed or skipped, and what came out."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbyol import atomic
from fastbyol.commandline import BAD_INPUT, DIVERGED, DONE, INTERRUPTED
from fastbyol.config import ConfigError
from fastbyol.evaluate import linear
from fastbyol.runfolder import RunFolder
from fastbyol.scores import load_scores
from fastbyol.tables.paper import Cell
from fastbyol.telemetry import read_metrics

POLL_S = 5.0  # every row of a run is read each time


class Crashed(RuntimeError):
    """Tell that the process of a cell ended as none of ours does: killed, or by a fault."""


@dataclass(frozen=True)
class Job:
    """Name one run: its cell, its seed, its folder, and the words after fastbyol-train that make it."""

    cell: Cell
    seed: int
    path: Path
    words: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        """Give the run folder."""
        return RunFolder(self.path)

    @property
    def log(self) -> Path:
        """Name the file of what the run said."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def record(self) -> Path:
        """Name the file that tells how the run ended; there only when it has."""
        return self.path.with_name(f"{self.path.name}.json")


@dataclass(frozen=True)
class Outcome:
    """Say how a run ended: exit status 0 or 3, its scores in percent and its last embedding std times root D.

    `told` is the run's own last line where it diverged. A score of None was not taken. linear_top1: of a linear
    classifier on cached representations.
    """

    status: int
    told: str = ""
    knn_top1: float | None = None
    knn_top1_random_init: float | None = None
    linear_top1: float | None = None
    spread: float | None = None


def outcome(job: Job) -> Outcome | None:
    """Read how a run ended; None where it has not. Raises ConfigError where another run stands in its place."""
    if not job.record.is_file():
        return None
    try:
        record = json.loads(job.record.read_text())
        words, status, told = tuple(record["words"]), record["status"], record["told"]
        result = json.loads(job.folder.result.read_text()) if status == DONE else {}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"{job.record} is no record of a run ({error}); remove it, and the run is repeated"
        ) from error
    if words != job.words:
        raise ConfigError(
            f"{job.path} was made by fastbyol-train {' '.join(words)}, and wanted is {' '.join(job.words)}; "
            "give the old settings, or another --out"
        )
    rows = read_metrics(job.folder.metrics)
    root = math.sqrt(job.folder.read_config().recipe.head.out)
    return Outcome(
        status,
        told,
        knn_top1=result.get("knn_top1"),
        knn_top1_random_init=result.get("knn_top1_random_init"),
        linear_top1=_linear_top1(job),
        spread=root * rows[-1]["embedding_std"] if rows else None,
    )


def _linear_top1(job: Job) -> float | None:
    """Find the score on cached representations of the job's own files, as score_linearly takes it."""
    wanted = {"protocol": "linear", "views": "cached", "epochs": linear.EPOCHS, "seed": 0}
    for scores in load_scores(job.folder):
        own = {f"--data={scores['train']}", f"--val={scores['val']}"} <= set(job.words)
        if own and wanted.items() <= {name: scores.get(name) for name in wanted}.items():
            top1: float = scores["trained"]["top1"]
            return top1
    return None


def carry_out(job: Job, *, watch: Callable[[float], None]) -> None:
    """Run fastbyol-train for a job, or continue it, and record how it ended; `watch` is told its progress in [0, 1].

    Raises ConfigError with the run's own line for bad input, Crashed where it was killed or broke, KeyboardInterrupt
    where a signal stopped it or this process: the run has then written a checkpoint.
    """
    job.path.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if job.folder.config.exists() else []
    status = _run(job, ["fastbyol.train", *job.words, f"--out={job.path}", *resume], watch)
    record = {"words": job.words, "status": status, "told": _last_line(job.log) if status == DIVERGED else ""}
    atomic.write(job.record, json.dumps(record, indent=2) + "\n")


def score_linearly(job: Job, *, watch: Callable[[float], None]) -> None:
    """Run fastbyol-eval linear on the encoder of a job, which keeps the score in its folder; raises as carry_out."""
    config = job.folder.read_config()
    words = ["linear", str(job.path), f"--train={config.data}", f"--val={config.val}", "--cached", "--skip-random-init"]
    _run(job, ["fastbyol.eval", *words, f"--device={config.device}", f"--workers={config.workers}"], watch)


def _run(job: Job, words: Sequence[str], watch: Callable[[float], None]) -> int:
    """Run a module of ours with its words, and return its status: 0 or 3; see carry_out."""
    with job.log.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the run once
        )
        try:
            status = _wait(process, job, watch)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    told = _last_line(job.log)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status == BAD_INPUT:
        raise ConfigError(told.removeprefix("fastbyol-train: error: ").removeprefix("fastbyol-eval: error: "))
    if status not in (DONE, DIVERGED):
        raise Crashed(f"{job.cell.name}, seed {job.seed}, ended with status {status}: {told}; see {job.log}")
    return status


def _wait(process: subprocess.Popen[bytes], job: Job, watch: Callable[[float], None]) -> int:
    """Wait for the run to end; hand on the first Ctrl-C, so that it can write a checkpoint."""
    try:
        while True:
            try:
                return process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                rows = read_metrics(job.folder.metrics)
                watch(rows[-1]["progress"] if rows else 0.0)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
