"""The last line of a finished run: its scores, its report, and the command that one would give next."""

from __future__ import annotations

import shlex
from typing import Any

from fastbyol.config import Config
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.shell import operand
from fastbyol.train.scoring import BASELINES


def closing_line(folder: RunFolder) -> str:
    """Return the line from the run's files; a score that the run does not have is left out."""
    result = folder.read_result()
    parts = [*_scores(result), f"report: {folder.report}", f"next: {_next_command(folder, folder.read_config())}"]
    return "; ".join(parts)


def _scores(result: dict[str, Any]) -> list[str]:
    """Describe kNN beside its baselines, and the online probe."""
    trained, probe = result.get("knn_top1"), result.get("probe_top1")
    baselines = {name: result.get(f"knn_top1_{name.replace(' ', '_')}") for name in BASELINES}
    known = ", ".join(f"{name} {top1:.1f} %" for name, top1 in baselines.items() if top1 is not None)
    knn = [] if trained is None else [f"kNN {trained:.1f} %" + (f" ({known})" if known else "")]
    return knn + ([] if probe is None else [f"online probe {probe:.1f} %"])


def _next_command(folder: RunFolder, config: Config) -> str:
    """Return the command that scores the encoder by a linear classifier or, without labels, maps the images."""
    run = operand(folder.path)
    if config.val is None:
        words = ["fastbyol-embed", run, operand(config.data), "--out", "vectors.npy", "--map", "map.html"]
    else:
        train = operand(config.labelled or config.data)
        words = ["fastbyol-eval", "linear", run, "--train", train, "--val", operand(config.val)]
    return shlex.join(words)
