"""python benchmarks/report.py benchmarks/results/*.jsonl: turn rows into Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

from benchmarks.document import DOCUMENT, put
from benchmarks.rows import SHOWN, Row, read, table

MARKERS = {
    True: (
        "<!-- gpu rows: python benchmarks/report.py benchmarks/results/*.jsonl --write -->",
        "<!-- end of gpu rows -->",
    ),
    False: (
        "<!-- cpu rows: python benchmarks/report.py benchmarks/results/*.jsonl --write -->",
        "<!-- end of cpu rows -->",
    ),
}
OURS = "fastbyol"
# The implementations of this case do more or less, as their names say.
HOST_CASE, HOST_BASELINE = "loader", "fastbyol native: decode"
NONE_YET = {True: "No GPU has run these benchmarks yet.", False: "No CPU has run these benchmarks yet."}
COLUMNS = (*(name for name in SHOWN if name not in ("case", "error")), "commit", "error")  # a case has its own table


def is_gpu(row: Row) -> bool:
    """Return whether a row was measured on a GPU; the oldest rows name no GPU and had none."""
    return row.get("gpu") is not None


def machine(row: Row) -> str:
    """Return the machine that a row was measured on; rows of two machines are never compared."""
    versions = [f"{name} {row[name]}" for name in ("torch", "triton", "cuda", "python") if row.get(name)]
    processor = row["gpu"] if is_gpu(row) else f"{row['hardware']}, {row['threads']} threads"
    return f"{processor}; {', '.join(versions)}"


def question(row: Row) -> tuple[str, str, str]:
    """Return the key of the comparison that a row belongs to."""
    return row["case"], row["shape"], row["dtype"]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Keep the last row of each implementation, shape and machine, in the order they were first measured in."""
    last = {(machine(row), *question(row), row["implementation"]): row for row in rows}
    return list(last.values())


def summary(rows: Sequence[Row]) -> str:
    """Format fastbyol's best beside the best rival, one line per comparison that has both."""
    lines = [
        "| case | shape | fastbyol ms | best rival | its ms | times faster | fraction of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    alike = (row for row in rows if row["case"] != HOST_CASE)
    for _, compared in groupby(sorted(alike, key=question), key=question):
        timed = sorted((row for row in compared if row["p50_ms"] is not None), key=lambda row: row["p50_ms"])
        ours = next((row for row in timed if row["implementation"].startswith(OURS)), None)
        rival = next((row for row in timed if not row["implementation"].startswith(OURS)), None)
        if ours is None or rival is None:
            continue
        cells = (
            ours["case"],
            ours["shape"],
            ours["p50_ms"],
            rival["implementation"],
            rival["p50_ms"],
            f"{rival['p50_ms'] / ours['p50_ms']:.2f}",
            "" if ours.get("fraction_of_copy") is None else ours["fraction_of_copy"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def host_costs(rows: Sequence[Row]) -> str:
    """Format the CPU time of an image, how many times native's it is, and images/s: one table per set of images.

    Rows of older versions, which hold no CPU time, are left out.
    """
    timed = [row for row in rows if row["case"] == HOST_CASE and row.get("cpu_ms_per_image") is not None]
    parts = []
    for name in dict.fromkeys(_image_set(row) for row in timed):
        here = {(row["implementation"], row["shape"]): row for row in timed if _image_set(row) == name}
        shapes = list(dict.fromkeys(shape for _, shape in here))
        lines = [
            [
                f"{name}: CPU ms an image (times native's), images/s",
                *(shape.removeprefix(f"{name}, ") for shape in shapes),
            ]
        ]
        lines.append(["---"] * len(lines[0]))
        for implementation in dict.fromkeys(implementation for implementation, _ in here):
            cells = (_host_cost(here, implementation, shape) for shape in shapes)
            lines.append([implementation, *cells])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _image_set(row: Row) -> str:
    name, _size, _threads = row["shape"].rsplit(", ", 2)
    return str(name)


def _host_cost(rows: Mapping[tuple[str, str], Row], implementation: str, shape: str) -> str:
    row, baseline = rows.get((implementation, shape)), rows.get((HOST_BASELINE, shape))
    if row is None:
        return ""
    times = "" if baseline is None else f" ({row['cpu_ms_per_image'] / baseline['cpu_ms_per_image']:.2f})"
    return f"{row['cpu_ms_per_image']:.2f}{times}, {row['images_per_s']:.0f}"


def markdown(rows: Iterable[Row], *, on_gpu: bool) -> str:
    """Format what was measured on GPUs, or on CPUs: one section per machine, with a summary and one table per case."""
    kept = [row for row in newest(rows) if is_gpu(row) == on_gpu]
    if not kept:
        return NONE_YET[on_gpu]
    parts = []
    for name, measured in groupby(sorted(kept, key=machine), key=machine):
        here = list(measured)
        parts += [f"### {name}", summary(here), host_costs(here)]
        for case, of_case in groupby(sorted(here, key=lambda row: row["case"]), key=lambda row: row["case"]):
            parts += [f"**{case}**", table(list(of_case), COLUMNS)]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    """Print the tables, or put them into docs/performance.md."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="F.jsonl")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    args = parser.parse_args()
    rows = [row for path in args.files for row in read(path)]
    for on_gpu, (begin, end) in MARKERS.items():
        if args.write:
            put(markdown(rows, on_gpu=on_gpu), DOCUMENT, begin, end)
        else:
            print(f"## Measured on {'GPUs' if on_gpu else 'CPUs'}\n\n{markdown(rows, on_gpu=on_gpu)}\n")


if __name__ == "__main__":
    main()
