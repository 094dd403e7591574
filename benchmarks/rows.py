"""Rows of results: what was timed, how long it took or why it failed, and where it ran."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

ROOT = Path(__file__).parents[1]
SHOWN = (
    "case",
    "shape",
    "dtype",
    "implementation",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "host_ms",
    "cpu_ms_per_image",
    "images_per_s",
    "gb_per_s",
    "fraction_of_copy",
    "error",
)

Row = dict[str, Any]


def row_of(
    named: Mapping[str, str],
    *,
    taken_ms: Sequence[float] = (),
    host_ms: Sequence[float] = (),
    cpu_ms: Sequence[float] = (),
    images: int | None = None,
    bytes_moved: int | None = None,
    copy_gb_per_s: float | None = None,
    error: str | None = None,
) -> Row:
    """Reduce times to quantiles and rates; a row with an error has none."""
    p20, p50, p80 = np.quantile(taken_ms, [0.2, 0.5, 0.8]).tolist() if taken_ms else (None, None, None)
    cpu_ms_per_image = None if images is None or not cpu_ms else float(np.median(cpu_ms)) / images
    gb_per_s = None if bytes_moved is None or p50 is None else bytes_moved / p50 / 1e6
    return {
        **named,
        "p20_ms": _rounded(p20, 4),
        "p50_ms": _rounded(p50, 4),
        "p80_ms": _rounded(p80, 4),
        "host_ms": _rounded(float(np.median(host_ms)) if host_ms else None, 4),
        "cpu_ms_per_image": _rounded(cpu_ms_per_image, 4),
        "images_per_s": None if images is None or p50 is None else round(1000 * images / p50, 1),
        "gb_per_s": _rounded(gb_per_s, 1),
        "copy_gb_per_s": _rounded(copy_gb_per_s, 1),
        "fraction_of_copy": None if gb_per_s is None or copy_gb_per_s is None else round(gb_per_s / copy_gb_per_s, 3),
        "repeats": len(taken_ms),
        "error": error,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def has_failed(row: Row) -> bool:
    """Return whether a row stands for something broken or unmeasured, not merely for a rival that is not installed."""
    error = row.get("error")
    return error is not None and not error.startswith("absent")


@cache
def place(device: str, commit: str | None = None) -> Row:
    """Describe the machine: commit (given for a tree without git), processor, GPU, threads, load, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "commit": commit or _described(),
        "hardware": f"{len(models)} x {models[0]}" if models else platform.machine(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _described() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    described = subprocess.run(
        [git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append the rows to a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """Read a .jsonl file of rows, of any version of the benchmarks."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: Sequence[Row], columns: Sequence[str] = SHOWN) -> str:
    """Format the rows as a Markdown table, without the columns that none of them fills."""
    names = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    for row in rows:
        cells = ("" if row.get(name) is None else str(row[name]).replace("|", "/") for name in names)
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def line(row: Row) -> str:
    """Format a row as one line of progress."""
    named = ", ".join(row[name] for name in ("case", "shape", "implementation"))
    if row["error"]:
        return f"{named}: {row['error']}"
    fraction = row["fraction_of_copy"]
    return f"{named}: {row['p50_ms']} ms" + ("" if fraction is None else f", {fraction:.0%} of a copy")
