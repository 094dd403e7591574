"""The summary of a call: how each part ended, measured beside predicted, tables, failures with their last lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import predictions
from benchmarks.gpu.parts import Outcome

Row = Mapping[str, Any]
TRACEBACK_LINES = 30
TRAINING = (
    "shape",
    "implementation",
    "steps",
    "images_per_s",
    "warm_images_per_s",
    "loader_wait_share",
    "gpu_idle_share",
    "mfu",
    "peak_gib",
    "knn_top1",
    "knn_top1_random_init",
    "last_loss",
    "elapsed_s",
    "error",
)
BENCH = (
    "case",
    "shape",
    "implementation",
    "p50_ms",
    "host_ms",
    "images_per_s",
    "gb_per_s",
    "fraction_of_copy",
    "error",
)
OTHER = ("case", "shape", "implementation", "result", "top1", "top1_random_init", "elapsed_s", "error")
NCU = (
    "implementation",
    "duration",
    "dram_percent",
    "memory_throughput",
    "l2_hit_percent",
    "occupancy_percent",
    "registers",
    "error",
)
APART = ("training", "score", "images", "part", "ncu")


def markdown(title: str, facts: Row, outcomes: Sequence[Outcome], rows: Sequence[Row], faults: Sequence[str]) -> str:
    """Write the page: what failed first, so that a reader with a minute knows where to look."""
    gpu = facts.get("gpu")
    parts = [f"# {title}", ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)]
    if gpu is None:
        parts.append("**A rehearsal on a CPU: small shapes, nothing here says anything about a GPU.**")
    parts += ["## How each part ended", _outcomes(outcomes)]
    failures = _failures(outcomes, rows)
    parts += ["## What failed", failures] if failures else []
    parts += ["## What the output lacks", "\n".join(f"- {fault}" for fault in faults)] if faults else []
    parts += ["## Measured beside predicted", PREDICTED_NOTE, predictions.markdown(rows, gpu)]
    parts += _section("Trainings", [row for row in rows if row["case"] == "training"], TRAINING)
    parts += _section("Scores and other rows", [row for row in rows if _is_other(row)], OTHER)
    parts += _section("Benchmarks", [row for row in rows if "p50_ms" in row], BENCH)
    parts += _section("Counters of the batch-norm kernels", [row for row in rows if row["case"] == "ncu"], NCU)
    return "\n\n".join(parts) + "\n"


PREDICTED_NOTE = (
    "Only the column `measured` was measured. Likely values and bounds are computed from bytes and operations, "
    "aims are what is wanted; both were written down before."
)


def _outcomes(outcomes: Sequence[Outcome]) -> str:
    lines = ["| part | seconds | ended |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {o.name} | {o.seconds:.0f} | {_cell(o.status)} |" for o in outcomes)])


def _failures(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> str:
    """List what went wrong, with the end of what it printed; log.txt has it whole."""
    parts = []
    for outcome in outcomes:
        if not outcome.is_ok and not outcome.status.startswith("not run"):
            said = "\n".join(outcome.last_lines)
            parts.append(
                f"**{outcome.name}**: {outcome.status}; whole: `grep '{outcome.name} |' log.txt`\n\n```\n{said}\n```"
            )
    for row in rows:
        if row.get("traceback"):
            lines = row["traceback"].rstrip().splitlines()[-TRACEBACK_LINES:]
            named = ", ".join(str(row[name]) for name in ("case", "shape", "implementation"))
            parts.append(f"**{named}**\n\n```\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts)


def _is_other(row: Row) -> bool:
    return row["case"] in ("score", "images") or ("p50_ms" not in row and row["case"] not in APART)


def _section(title: str, rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    if not rows:
        return []
    names = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(_cell(_short(row.get(name))) for name in names) for row in rows]
    return [f"## {title}", "\n".join(f"| {line} |" for line in lines)]


def _short(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else value


def _cell(value: object) -> str:
    return str(value).replace("|", "/").replace("\n", " ")[:300]
