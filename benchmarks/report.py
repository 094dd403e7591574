"""python benchmarks/report.py benchmarks/results/*.jsonl: turn rows into Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

from benchmarks.rows import ROOT, Row, read, table

DOCUMENT = ROOT / "docs" / "performance.md"
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
NONE_YET = {True: "No GPU has run these benchmarks yet.", False: "No CPU has run these benchmarks yet."}
COLUMNS = (
    "shape",
    "dtype",
    "implementation",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "host_ms",
    "images_per_s",
    "gb_per_s",
    "fraction_of_copy",
    "commit",
    "error",
)


def is_gpu(row: Row) -> bool:
    """Tell where a row was measured; the oldest rows name no GPU and had none."""
    return row.get("gpu") is not None


def machine(row: Row) -> str:
    """Name what a row was measured on: rows of two machines are never compared."""
    versions = [f"{name} {row[name]}" for name in ("torch", "triton", "cuda", "python") if row.get(name)]
    processor = row["gpu"] if is_gpu(row) else f"{row['hardware']}, {row['threads']} threads"
    return f"{processor}; {', '.join(versions)}"


def question(row: Row) -> tuple[str, str, str]:
    """Name the comparison a row belongs to."""
    return row["case"], row["shape"], row["dtype"]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Keep the last row of each implementation, shape and machine, in the order they were first measured in."""
    last = {(machine(row), *question(row), row["implementation"]): row for row in rows}
    return list(last.values())


def summary(rows: Sequence[Row]) -> str:
    """Set fastbyol's best beside the best rival, a line a comparison; nothing where there is only one of them."""
    lines = [
        "| case | shape | fastbyol ms | best rival | its ms | times faster | fraction of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, compared in groupby(sorted(rows, key=question), key=question):
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


def markdown(rows: Iterable[Row], *, on_gpu: bool) -> str:
    """Lay out what was measured on GPUs, or on CPUs: a section a machine, a summary and a table a case."""
    kept = [row for row in newest(rows) if is_gpu(row) == on_gpu]
    if not kept:
        return NONE_YET[on_gpu]
    parts = []
    for name, measured in groupby(sorted(kept, key=machine), key=machine):
        here = list(measured)
        parts += [f"### {name}", summary(here)]
        for case, of_case in groupby(sorted(here, key=lambda row: row["case"]), key=lambda row: row["case"]):
            parts += [f"**{case}**", table(list(of_case), COLUMNS)]
    return "\n\n".join(part for part in parts if part)


def put(text: str, document: Path, begin: str, end: str) -> None:
    """Replace what stands between two markers of a document."""
    before, rest = document.read_text().split(begin)
    _, after = rest.split(end)
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")


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
