"""python benchmarks/bench.py loader|step|optimizer|views: time a part of fastbyol, print a table, keep the rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

from benchmarks import cases, harness


def main() -> None:
    """Time the cases of one group."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Time a part of fastbyol on this machine.")
    parser.add_argument("group", choices=["loader", "step", "optimizer", "views"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this .jsonl")
    parser.add_argument("--repeats", type=int, default=20, metavar="N")
    parser.add_argument("--data", type=Path, metavar="F.beton", help="for loader")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="for loader")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="for loader")
    args = parser.parse_args()
    if args.group == "loader":
        if args.data is None:
            parser.error("loader needs --data F.beton, written by fastbyol-prep")
        chosen = cases.loader_cases(args.data, batch_size=args.batch_size, workers=args.workers)
    else:
        build = {"step": cases.step_cases, "optimizer": cases.optimizer_cases, "views": cases.view_cases}
        chosen = build[args.group]()
    rows = harness.measure(chosen, repeats=args.repeats)
    print(harness.table(rows))
    if args.json:
        harness.append(args.json, rows)


if __name__ == "__main__":
    main()
