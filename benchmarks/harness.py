"""Know how a benchmark is timed and written down: interleaved repeats, quantiles, and where it ran."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """Name something to time: `run` does it once, over `images` images where that means anything."""

    case: str
    shape: str
    implementation: str
    run: Callable[[], object]
    images: int | None = None
    dtype: str = "float32"


def measure(cases: Sequence[Case], *, repeats: int) -> list[dict[str, Any]]:
    """Time the cases in turn, `repeats` rounds after one of warm-up, so that a busy minute falls on all alike."""
    times: list[list[float]] = [[] for _ in cases]
    for round_number in range(repeats + 1):
        for case, taken in zip(cases, times, strict=True):
            began = time.perf_counter()
            case.run()
            if round_number:
                taken.append(1000 * (time.perf_counter() - began))
    return [_row(case, taken) for case, taken in zip(cases, times, strict=True)]


def _row(case: Case, taken_ms: list[float]) -> dict[str, Any]:
    p20, p50, p80 = (round(float(q), 3) for q in np.quantile(taken_ms, [0.2, 0.5, 0.8]))
    rate = None if case.images is None else round(1000 * case.images / p50, 1)
    return {
        "case": case.case,
        "shape": case.shape,
        "dtype": case.dtype,
        "implementation": case.implementation,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "images_per_s": rate,
        "repeats": len(taken_ms),
        **_place(),
    }


def _place() -> dict[str, Any]:
    """Say where and with what: commit, processor, threads, versions."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": described.stdout.strip() or "unknown",
        "hardware": f"{len(models)} x {models[0]}" if models else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add the rows to a .jsonl file; results are kept, not replaced."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table."""
    names = ("case", "shape", "implementation", "p20_ms", "p50_ms", "p80_ms", "images_per_s")
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join("" if row[name] is None else str(row[name]) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
