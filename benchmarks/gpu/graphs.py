"""python benchmarks/gpu/graphs.py --rows FILE: which fusions cuDNN's graph API offers on this card, and how fast.

Needs the package nvidia-cudnn-frontend, which carry.py brings; without it, a row says so. Each pattern has its share of
the time, and within that the largest convolutions come first. Without a GPU cuDNN is asked, in reduced form, what it
would do on an H100.
"""

# ruff: noqa: PLC0415  # the package may be missing
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

import torch

from benchmarks import harness, rows
from benchmarks.cases import graphs
from benchmarks.gpu.output import append_row
from benchmarks.gpu.parts import SKIPPED

PACKAGE = "nvidia-cudnn-frontend"
REPEATS, SECONDS = 10, 0.3  # of a graph, at most
CUT_OFF = "TimeoutError"  # a preparation for which a pattern's share of the time was too short

NEEDS_DRIVER = "PREREQUISITE_MISSING"  # an engine that is compiled at run time, where there is no driver
# What cuDNN wants to know of an H100 where there is none: CUDA's device attributes, as its programming guide has them.
H100: dict[str, Any] = {
    "deviceName": "NVIDIA H100 80GB HBM3",
    "deviceVer": 900,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "pciDeviceId": 0,
    "multiProcessorCount": 132,
    "smClockRateKHz": 1980000,
    "memClockRateKHz": 2619000,
    "l2CacheSize": 50 * 2**20,
    "totalGlobalMem": 80 * 2**30,
    "warpSize": 32,
    "maxGridSize": [2**31 - 1, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 48 * 1024,
    "maxSharedMemoryPerBlockOptin": 227 * 1024,
    "reservedSharedMemoryPerBlock": 1024,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
}


def frontend() -> ModuleType | str:
    """Import the package with cuDNN itself, or say why that cannot be."""
    try:
        import cudnn
    except ImportError as error:
        return f"{PACKAGE} cannot be imported ({error}); carry its wheel"
    try:
        cudnn.backend_version()
    except RuntimeError as error:
        return f"{PACKAGE} finds no cuDNN ({error})"
    return cudnn  # type: ignore[no-any-return]  # the package has no types


def timed(cudnn: ModuleType, limit_s: float, commit: str | None) -> Iterator[rows.Row]:
    """Time every pattern in every precision on this card, each until its share of the seconds is over."""
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    asked = [(name, dtype) for name in graphs.PATTERNS for dtype in graphs.DTYPES]
    end = time.monotonic() + limit_s
    for number, (name, dtype) in enumerate(asked):
        share = (end - time.monotonic()) / (len(asked) - number)  # what one leaves is the others'
        limits = harness.Limits(repeats=REPEATS, seconds=SECONDS, deadline=time.monotonic() + share)
        cases = graphs.cases(cudnn, handle, name, dtype)
        for found in harness.measure(cases, device="cuda", limits=limits, commit=commit):
            yield from found


def verdict(
    cudnn: ModuleType, pattern: Callable[[graphs.Sketch], None], shape: graphs.Shape, dtype: torch.dtype
) -> str:
    """Say what cuDNN holds of a pattern on an H100, asked where there is none."""
    sketch = graphs.Sketch(cudnn, shape, dtype, device_property=cudnn.create_device_properties(json.dumps(H100)))
    pattern(sketch)
    try:
        graphs.plan(sketch)
    except cudnn.cudnnGraphNotSupportedError as refusal:
        if NEEDS_DRIVER in str(refusal):
            return "unknown: engines that are compiled at run time need a driver, others refuse"
        return "refused"
    except RuntimeError as error:
        if "cuda_get_device" not in str(error):
            raise
    return "supported"  # a plan was found; what fails then is the wish to build it on a device


def asked(cudnn: ModuleType) -> Iterator[rows.Row]:
    """Ask cuDNN what it would do on an H100: one 1x1 and one 3x3 convolution of every pattern and precision."""
    found = graphs.shapes()
    chosen = [next(shape for shape in found if (shape.size, shape.stride) == (size, 1)) for size in (1, 3)]
    for name, pattern in graphs.PATTERNS.items():
        for dtype in graphs.DTYPES:
            for shape in chosen:
                said = verdict(cudnn, pattern, shape, dtype)
                named = {"case": f"cuDNN graph: {name}", "shape": str(shape), "implementation": "cudnn-frontend"}
                error = f"absent: no GPU; on an H100 cuDNN {cudnn.backend_version_string()} says: {said}"
                yield {**named, "dtype": str(dtype).removeprefix("torch."), "error": error}


def main() -> int:
    """Leave the rows; return 1 where a graph failed, SKIPPED where the package is missing."""
    parser = argparse.ArgumentParser(prog="graphs.py", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--facts", type=Path, metavar="FILE", help="the machine, for the rows")
    parser.add_argument("--limit", type=float, default=110.0, metavar="SECONDS", help="for all patterns together")
    args = parser.parse_args()
    facts: dict[str, Any] = json.loads(args.facts.read_text()) if args.facts and args.facts.exists() else {}
    cudnn = frontend()
    if isinstance(cudnn, str):
        named = {"case": "cuDNN graph", "shape": "", "dtype": "", "implementation": "cudnn-frontend"}
        append_row(args.rows, named | {"error": f"absent: {cudnn}"} | facts)
        print(cudnn, flush=True)
        return SKIPPED
    has_failed = False
    for row in timed(cudnn, args.limit, facts.get("commit")) if torch.cuda.is_available() else asked(cudnn):
        append_row(args.rows, row | facts)
        print(rows.line({"fraction_of_copy": None, **row}), flush=True)
        error = row["error"] or ""
        has_failed = has_failed or (error.startswith("failed") and CUT_OFF not in error)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
