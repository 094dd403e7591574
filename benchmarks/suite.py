"""Know what `make gpu` does: GPU tests, then every group of benchmarks, rows and tables, in eight minutes.

Each part is a process of its own with a time limit, so that none takes the others with it. Without a GPU the same parts
run in their reduced form, as a rehearsal whose rows are not kept among the results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, from a checkout

TOTAL_S = 470.0  # of eight minutes; the rest is the start of this process and the tables at its end
GRACE_S = 12.0  # between a benchmark's own limit and the end of its patience
FAREWELL_S = 8.0  # for a part that is stopped to print its summary
RESULTS = {"cuda": ROOT / "benchmarks" / "results" / "gpu.jsonl", "cpu": ROOT / "runs" / "reduced" / "cpu.jsonl"}
REPEATS = {"cuda": 50, "cpu": 5}
LIMITS_S = {"kernels": 90.0, "optimizer": 30.0, "views": 30.0, "step": 180.0, "loader": 20.0}
OPTIONS = {"loader": ("--only", "500 px, 2 threads, fastbyol native")}  # of six comparisons, what fits the time
TEST_WORKERS = 8  # compiling kernels is what takes the time


@dataclass(frozen=True)
class Part:
    """Name a command and its time limit; a group of benchmarks leaves a row where it is stopped or breaks."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    is_group: bool = True


@dataclass(frozen=True)
class Outcome:
    """Hold how a part ended."""

    name: str
    status: str
    seconds: float


def parts(device: str, results: Path, commit: str | None) -> list[Part]:
    """List the parts in the order of what a first run on a new GPU most needs to know."""
    workers = ("-n", str(TEST_WORKERS)) if device == "cuda" and importlib.util.find_spec("xdist") else ()
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "tests/kernels", "tests/gpu")
    made = [Part("tests", tests, 120.0, is_group=False)]
    for group, limit_s in LIMITS_S.items():
        options = ["--device", device, "--json", str(results), "--repeats", str(REPEATS[device])]
        options += [
            "--limit",
            str(limit_s - GRACE_S),
            *(("--commit", commit) if commit else ()),
            *OPTIONS.get(group, ()),
        ]
        made.append(Part(group, ("benchmarks/bench.py", group, *options), limit_s))
    return made


def run(part: Part, *, deadline: float) -> Outcome:
    """Run a part to its end or its limit, and everything it started with it."""
    began = time.monotonic()
    limit_s = min(part.limit_s, deadline - began)
    if limit_s <= 0:
        return Outcome(part.name, "not run: no time was left", 0.0)
    process = subprocess.Popen([sys.executable, *part.arguments], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit_s)
        status = "ok" if code == 0 else f"failed: exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"failed: stopped after {limit_s:.0f} s"
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints what failed so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(FAREWELL_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(part.name, status, time.monotonic() - began)


def main() -> int:
    """Run every part, write the tables, print a short one last; return 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="suite.py", description=__doc__)
    parser.add_argument("--commit", metavar="TEXT", help="to write into the rows of a tree without git")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of benchmarks/results/gpu.jsonl")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print(f"{sys.executable} has no torch; name one that has: make gpu PYTHON_GPU=/path/to/python", file=sys.stderr)
        return 2
    import torch  # noqa: PLC0415  # said above what to do without it

    deadline = time.monotonic() + TOTAL_S
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = (args.json or RESULTS[device]).resolve()
    if device == "cpu":
        print("no GPU here: GPU tests are skipped, and benchmarks run their reduced CPU form")
    outcomes = []
    for part in parts(device, results, args.commit or None):
        print(f"\n== {part.name}, at most {part.limit_s:.0f} s", flush=True)
        outcomes.append(run(part, deadline=deadline))
        if part.is_group:
            _note(outcomes[-1], results, device, args.commit or None)
    _write_tables(results, device)
    for outcome in outcomes:
        print(f"{outcome.name:10} {outcome.seconds:6.0f} s  {outcome.status}")
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def _note(outcome: Outcome, results: Path, device: str, commit: str | None) -> None:
    """Leave a row for a group that was stopped or never ran; one that ended has its own."""
    from benchmarks import rows  # noqa: PLC0415  # needs torch

    if outcome.status not in ("ok", "failed: exit status 1"):
        named = {"case": outcome.name, "shape": "the whole group", "dtype": "", "implementation": "all"}
        rows.append(results, [rows.row_of(named, error=outcome.status) | rows.place(device, commit)])


def _write_tables(results: Path, device: str) -> None:
    """Write the Markdown beside the rows; print fastbyol against its best rivals."""
    from benchmarks import report, rows  # noqa: PLC0415  # needs torch

    if not results.exists():
        return
    kept = rows.read(results)
    results.with_suffix(".md").write_text(report.markdown(kept, on_gpu=device == "cuda") + "\n")
    here = [row for row in report.newest(kept) if report.is_gpu(row) == (device == "cuda")]
    broken = [row for row in here if rows.has_failed(row)]
    print(f"\nrows: {results}\n\n{report.summary(here)}\n")
    for row in broken:
        print(rows.line(row))


if __name__ == "__main__":
    sys.exit(main())
