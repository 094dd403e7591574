"""NVIDIA's tools on our kernels: compute-sanitizer on small cases, ncu's counters of the batch-norm kernels.

`tools.py sanitizer|ncu --rows FILE`; `tools.py case NAME` is what they run. A missing tool is a row that says so.
"""

# ruff: noqa: PLC0415  # torch is imported by the process that is looked at, not by the one that starts it
from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

from benchmarks.gpu.output import append_row
from benchmarks.gpu.parts import SKIPPED

CASES = ("batchnorm", "views")  # under the sanitizer
KERNELS = ("stats_kernel", "apply_kernel", "backward_sums_kernel")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
SHOWN = {
    "DRAM Throughput": "dram_percent",
    "Memory Throughput": "memory_throughput",
    "Duration": "duration",
    "Achieved Occupancy": "occupancy_percent",
    "Registers Per Thread": "registers",
    "L2 Hit Rate": "l2_hit_percent",
}


def run_case(name: str, *, is_large: bool = False) -> None:
    """Run one case on the GPU: small odd shapes for the sanitizer, a ResNet-50's for the counters."""
    import torch

    from benchmarks.cases import batchnorm, views

    if name == "batchnorm":
        problem = batchnorm.Problem(256 if is_large else 37, 56 if is_large else 5, True, 2, "cuda")
        tensors = batchnorm._tensors(problem)
        forward = batchnorm.partial(batchnorm.fused, views=2)
        batchnorm._run(forward, tensors, parts=1, backward=True)()
    else:
        problem_ = views.Problem(3, 41, 57, 33)
        views._fastbyol(problem_, torch.bfloat16, lambda: views._tensors(problem_, "cuda")).run()
    torch.cuda.synchronize()


def counters(text: str) -> dict[str, dict[str, str]]:
    """Read ncu's CSV: for each kernel the metrics of its last launch, under our names."""
    start = text.find('"ID"')
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for line in csv.DictReader(io.StringIO(text[start:])) if start >= 0 else ():
        name = SHOWN.get(line.get("Metric Name") or "")
        if name:
            unit = line["Metric Unit"]
            value = line["Metric Value"] if unit in ("%", "") else f"{line['Metric Value']} {unit}"
            if name == "memory_throughput" and unit == "%":
                continue  # the same name in another section
            found[line["Kernel Name"].split("(")[0]][name] = value
    return dict(found)


def sanitizer(tool: str) -> Iterator[dict[str, Any]]:
    """Check the cases' accesses; every allocation apart, so that one past its end is seen."""
    for name in CASES:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--kernel-name", "kernel_substring=kernel"]
        command += [sys.executable, __file__, "case", name]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, env=environment, check=False)
        error = f"failed: compute-sanitizer ended with status {done.returncode}" if done.returncode else None
        yield {"case": "compute-sanitizer", "shape": name, "implementation": "fastbyol", "error": error}


def ncu(tool: str) -> Iterator[dict[str, Any]]:
    """Count what the three batch-norm kernels do on the widest batch norm at 56 px."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = [tool, "--clock-control", "none", *sections, "--csv", "--page", "details"]
    command += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})"]
    command += ["--launch-count", "6", sys.executable, __file__, "case", "batchnorm", "--large"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    found = counters(done.stdout)
    for kernel in KERNELS:
        error = (
            None if kernel in found else f"failed: ncu (status {done.returncode}) gave no counters of it; see the log"
        )
        named = {"case": "ncu", "shape": "2x256x256x56x56", "implementation": kernel, "error": error}
        yield named | found.get(kernel, {})


TOOLS = {"sanitizer": ("compute-sanitizer", sanitizer), "ncu": ("ncu", ncu)}


def main() -> int:
    """Run a tool and leave its rows; return 1 where it found something, SKIPPED where it is missing."""
    parser = argparse.ArgumentParser(prog="tools.py", description=__doc__)
    parser.add_argument("what", choices=[*TOOLS, "case"])
    parser.add_argument("name", nargs="?", choices=CASES)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rows", type=Path, metavar="FILE")
    parser.add_argument("--facts", type=Path, metavar="FILE", help="the machine, for the rows")
    args = parser.parse_args()
    if args.what == "case":
        run_case(args.name, is_large=args.large)
        return 0
    program, measure = TOOLS[args.what]
    found = shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")
    facts = json.loads(args.facts.read_text()) if args.facts and args.facts.exists() else {}
    failed = False
    if found is None or facts.get("gpu") is None:
        why = f"absent: {program} is not installed" if found is None else "absent: no GPU"
        append_row(args.rows, {"case": program, "shape": "", "implementation": "", "error": why} | facts)
        print(why.removeprefix("absent: "), flush=True)
        return SKIPPED
    for row in measure(found):
        failed = failed or row["error"] is not None
        append_row(args.rows, {"dtype": "", **row} | facts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
