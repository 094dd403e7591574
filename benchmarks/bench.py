"""python benchmarks/bench.py GROUP ...: time parts of fastbyol, kernels, loader, evaluate, ..., against rivals."""

# ruff: noqa: PLC0415  # see _cases_of_group
from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

import torch
import triton

from benchmarks import harness, rows
from fastbyol.system import device

GROUPS = ("kernels", "views", "optimizer", "step", "candidates", "loader", "prep", "evaluate", "embed")
HOST_GROUPS = ("loader", "prep", "evaluate", "embed")  # the same on a machine without a GPU
COMPILING_GROUPS = ("kernels", "optimizer", "step")
PREPARE_S = {"evaluate": 600.0, "embed": 600.0}  # a check and a warm-up of thousands of images


def cases_of(args: argparse.Namespace, where: str) -> Iterator[harness.Case]:
    """Build the cases of the groups, lazily; a group's compiled ones come last: a time limit cuts off no other."""
    for group in args.groups:
        cases = _cases_of_group(group, args, where)
        yield from sorted(cases, key=lambda case: case.is_compiled) if group in COMPILING_GROUPS else cases


def _cases_of_group(group: str, args: argparse.Namespace, where: str) -> Iterator[harness.Case]:
    """Build the cases of a group; imported here, so that a broken group breaks no other."""
    if group == "kernels":
        from benchmarks.cases import batchnorm, losses, pointwise, pooling, stem

        yield from batchnorm.cases(where)
        yield from pointwise.cases(where)
        yield from stem.cases(where)
        yield from pooling.cases(where)
        yield from losses.cases(where)
    elif group == "views":
        from benchmarks.cases import views

        yield from views.cases(where)
    elif group == "optimizer":
        from benchmarks.cases import optimizer

        yield from optimizer.cases(where)
    elif group == "step":
        from benchmarks.cases import step

        yield from step.cases(where)
    elif group == "candidates":
        from benchmarks.cases import candidates

        yield from candidates.cases(where)
    elif group == "loader":
        from benchmarks.cases import loader

        sizes = {"batch_size": args.batch_size, "workers": args.workers}
        yield from loader.cases(args.data, name=args.name, device=where, **sizes)
    elif group == "evaluate":
        from benchmarks.cases import evaluation

        yield from evaluation.cases(where)
    elif group == "embed":
        from benchmarks.cases import embedding

        yield from embedding.cases(where, workers=args.workers, images=args.images)
    else:
        from benchmarks.cases import prep

        yield from prep.cases(args.data, name=args.name, workers=args.workers)


def is_chosen(case: harness.Case, *, only: Sequence[str], without: Sequence[str]) -> bool:
    """Return whether a case is asked for: its name, shape or rival holds one of `only`, and none of `without`."""
    name = f"{case.case}, {case.shape}, {case.implementation}"
    return (not only or any(text in name for text in only)) and not any(text in name for text in without)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    described = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    described.add_argument("groups", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    described.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this .jsonl")
    described.add_argument("--device", choices=("cuda", "cpu"), help="the GPU if there is one")
    described.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds of a comparison, at most")
    described.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="for the whole group")
    described.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="cases that hold this; repeatable"
    )
    described.add_argument(
        "--without", action="append", default=[], metavar="TEXT", help="leave out cases that hold this; repeatable"
    )
    described.add_argument("--commit", metavar="TEXT", help="to write into the rows of a tree without git")
    described.add_argument("--start", type=int, default=0, metavar="N", help="skip the first N comparisons")
    described.add_argument("--data", type=Path, metavar="SOURCE", help="images for loader, or a .beton, and for prep")
    described.add_argument(
        "--name", metavar="TEXT", help="what the rows call the images; their file's name if not given"
    )
    described.add_argument("--batch-size", type=int, default=50, metavar="N", help="for loader")
    described.add_argument("--images", type=int, default=1000, metavar="N", help="in a round of embed")
    described.add_argument(
        "--workers", type=int, default=2, metavar="N", help="for loader, beside 1, for prep and embed"
    )
    return described


def main() -> int:
    """Time the cases of one group; return 1 where one failed."""
    args = parser().parse_args()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: an interpreter's times say nothing; unset it", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.limit
    where = device.choose_device(args.device)
    if where == "cpu" and not set(args.groups) <= set(HOST_GROUPS):
        print("no GPU is used; this is the reduced CPU form: small shapes, plain torch on both sides")
    torch.backends.cudnn.benchmark = True  # as training sets it
    prepare_s = max(PREPARE_S.get(group, harness.Limits.prepare_s) for group in args.groups)
    limits = harness.Limits(repeats=args.repeats, deadline=deadline, prepare_s=prepare_s)
    chosen = (c for c in cases_of(args, where) if is_chosen(c, only=args.only, without=args.without))
    kept: list[rows.Row] = []
    status = 0
    try:
        for found in harness.measure(chosen, device=where, limits=limits, start=args.start, commit=args.commit):
            kept += found
            for row in found:
                print(rows.line(row), flush=True)
            if args.json:
                rows.append(args.json, found)
    except harness.ContextLost as lost:
        print(f"{lost}; going on in a new process", flush=True)
        rest = ("--start", str(lost.number), "--limit", str(max(0.0, deadline - time.monotonic())))
        subprocess.run([sys.executable, *sys.argv, *rest], check=False)
        status = 1
    print(rows.table(kept))
    return 1 if any(map(rows.has_failed, kept)) else status


if __name__ == "__main__":
    sys.exit(main())
