"""python benchmarks/quality.py run SET ...: kNN scores of methods over equal compute, the referee of every default.

Compute is counted in CPU-seconds of one thread: the cost of a step is measured once for each method, and a budget fixes
the number of epochs, of which the score is a function. A method that has rows keeps their cost, so that its budgets lie
on one line. Measure the cost on a quiet machine: beside ten programs a step has cost 1.4 times as much. A line warns of
a run that used much more or less than its budget. Methods and recipes are compared on images held out of the training
set; `--test` scores a chosen method on the test set.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

import numpy as np
from numpy.typing import NDArray

from benchmarks import rows
from fastbyol.ablations import paper
from fastbyol.ablations.runs import Job, read_result, train_run
from fastbyol.beton import Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.errors import require
from fastbyol.evaluate import splits
from fastbyol.monitor.metrics import read_metrics
from fastbyol.order import permutation
from fastbyol.recipes import named
from fastbyol.schedule import build
from fastbyol.train.planning import WARMUP_MAX

HELD_PER_CLASS = 250
COST_STEPS, COST_COLD = 200, 100  # of the run that measures the cost of a step; the first ones cost a tenth more
COST_OFF = 0.15  # share of its budget by which a fair run may miss it
LOG_EVERY = 20
ROWS = Path(__file__).parent / "results" / "quality" / "rows.jsonl"
FLAGS = (
    "--device=cpu",
    "--precision=float32",  # alike on every CPU
    "--threads=1",
    "--workers=1",
    "--loader=memory",
    "--no-tensorboard",
    f"--log-every={LOG_EVERY}",
)


class Method(NamedTuple):
    """A method of the grid: its name, its change to the recipe ("" for none), and flags of fastbyol-train."""

    name: str
    change: str
    flags: tuple[str, ...]

    def recipe(self, base: str) -> str:
        """Return the name of the changed recipe."""
        return f"{base}+{self.change}" if self.change else base


class Cell(NamedTuple):
    """What identifies a row: recipe, method, what it is scored on, compute in CPU-seconds, seed."""

    shape: str
    implementation: str
    split: str
    budget_cpu_s: float
    seed: int


def parse_method(text: str) -> Method:
    """Parse "NAME: setting=value+... --flag=value": changes of the recipe, and flags of fastbyol-train."""
    name, _, rest = text.partition(":")
    words = rest.split()
    changes = [word for word in words if not word.startswith("--")]
    return Method(name.strip(), "+".join(changes), tuple(word for word in words if word.startswith("--")))


def hold_out(train: Path, folder: Path, *, per_class: int = HELD_PER_CLASS) -> tuple[Path, Path]:
    """Divide a labelled .beton in two, to learn from and to choose by, equally many of each class; return both paths.

    The division is a function of the number and the labels of the images. Files that exist are taken as they are.
    """
    learn, held = folder / "learn.beton", folder / "held.beton"
    if learn.exists() and held.exists():
        return learn, held
    folder.mkdir(parents=True, exist_ok=True)
    with Reader(train) as reader:
        require(reader.labels is not None, f"{train} has no labels, and scores need them; give a labelled .beton")
        assert reader.labels is not None
        chosen = np.zeros(len(reader), bool)
        for number, label in enumerate(np.unique(reader.labels)):
            members = np.flatnonzero(reader.labels == label)
            order = permutation(len(members), seed=0, epoch=splits.NO_EPOCH + number)
            chosen[members[order[: min(per_class, len(members) // 5)]]] = True
        for path, part in ((learn, ~chosen), (held, chosen)):
            _copy(reader, np.flatnonzero(part), path)
    return learn, held


def _copy(reader: Reader, indices: NDArray[np.int64], path: Path) -> None:
    assert reader.labels is not None
    with Writer(path, capacity=len(indices), class_names=reader.class_names, overwrite=True) as writer:
        for index in indices.tolist():
            sizes = int(reader.modes[index]), int(reader.widths[index]), int(reader.heights[index])
            image = StoredImage(*sizes, bytes(reader.payload(index)))
            writer.append(image, label=int(reader.labels[index]))


def job_of(
    method: Method, path: Path, *, base: str, train: Path, val: Path | None, epochs: float, seed: int = 0
) -> Job:
    """Describe one run; its warm-up is limited as in a run by the clock."""
    recipe = method.recipe(base)
    warmup = build(named(recipe), epochs=epochs, warmup_max=WARMUP_MAX).warmup * epochs
    files = [f"--data={train}", *([] if val is None else [f"--val={val}"])]
    length = [f"--epochs={epochs:.6g}", f"--warmup-epochs={warmup:.6g}", f"--seed={seed}"]
    return Job(paper.Cell(method.name, ""), seed, path, (recipe, *files, *length, *FLAGS, *method.flags))


def step_cost_s(method: Method, folder: Path, *, base: str, train: Path) -> float:
    """Measure the CPU-seconds of a step of a method, once; later calls read what was measured."""
    batch = named(method.recipe(base)).batch_size
    job = job_of(method, folder, base=base, train=train, val=None, epochs=COST_STEPS * batch / _count(train))
    if read_result(job) is None:
        train_run(job, on_progress=lambda _: None)
    timed = [row for row in read_metrics(job.folder.metrics) if COST_COLD < row["step"] <= COST_STEPS]
    cost_s: float = statistics.median(row["cpu_s"] / LOG_EVERY for row in timed)
    return cost_s


def _count(path: Path) -> int:
    with Reader(path) as reader:
        return len(reader)


def run(args: argparse.Namespace) -> None:
    """Complete the grid, seed by seed, a row for each run; a run that has its row is not repeated."""
    train, val = (args.data, args.test) if args.test else hold_out(args.data, args.work)
    split = "test" if args.test else "held out"
    grid = rows.read(args.json) if args.json.exists() else []
    known = {cell_of(row) for row in grid}
    for seed, cpu_s, method in product(args.seeds, args.cpu_s, args.method):
        cell = Cell(args.recipe, method.name, split, cpu_s, seed)
        if cell in known:
            continue
        pace = known_pace(grid, cell)
        if pace is None:
            cost_s = step_cost_s(method, args.work / split / method.name / "cost", base=args.recipe, train=train)
            pace = named(method.recipe(args.recipe)).batch_size / _count(train) / cost_s
        epochs = cpu_s * pace
        path = args.work / split / method.name / f"{cpu_s:g}s-{seed}"
        job = job_of(method, path, base=args.recipe, train=train, val=val, epochs=epochs, seed=seed)
        if read_result(job) is None:
            train_run(job, on_progress=lambda _: None)
        row = row_of(cell, job, method, epochs=epochs)
        rows.append(args.json, [row])
        if not is_fair(row):
            print(
                f"{method.name}: {row['cpu_s']:.0f} CPU-s were used of {cpu_s:g}, since a step cost more or less than "
                "when its cost was measured, as beside other programs; leave this method's rows out of --json and its "
                f"folder out of {args.work}, and repeat it on a quieter machine",
                file=sys.stderr,
            )
        score = "diverged" if row["knn_top1"] is None else f"kNN {row['knn_top1']:.1f}"
        print(f"{method.name}, {cpu_s:g} CPU-s, seed {seed}: {score} after {epochs:.3g} epochs", flush=True)


def is_fair(row: rows.Row) -> bool:
    """Tell whether a run used about as much compute as its budget."""
    return abs(row["cpu_s"] / row["budget_cpu_s"] - 1) <= COST_OFF


def known_pace(grid: Sequence[rows.Row], cell: Cell) -> float | None:
    """Return the epochs a CPU-second of a method in its longest run so far, on this kind of processor; None without."""
    here = rows.place("cpu")["hardware"]
    alike = [row for row in grid if cell_of(row)[:3] == cell[:3] and row["hardware"] == here]
    longest = max(alike, key=lambda row: row["budget_cpu_s"], default=None)
    return None if longest is None else longest["epochs"] / longest["budget_cpu_s"]


def cell_of(row: rows.Row) -> Cell:
    """Return what identifies a row."""
    return Cell(*(row[name] for name in Cell._fields))


def row_of(cell: Cell, job: Job, method: Method, *, epochs: float) -> rows.Row:
    """Return the row of a run that has ended."""
    result = read_result(job)
    assert result is not None
    return {
        "case": "quality",
        **cell._asdict(),
        "change": method.change,
        "flags": " ".join(method.flags),
        "epochs": round(epochs, 4),
        "cpu_s": round(math.fsum(row["cpu_s"] for row in read_metrics(job.folder.metrics)), 1),
        "knn_top1": result.knn_top1,
        "knn_top1_random_init": result.knn_top1_random_init,
        **rows.place("cpu"),
        "threads": 1,
    }


def summary(grid: Sequence[rows.Row], *, recipe: str, split: str) -> dict[str, dict[float, list[rows.Row]]]:
    """Group the rows of a recipe by method, by name, and by compute, ascending; runs that diverged are left out."""
    found: dict[str, dict[float, list[rows.Row]]] = {}
    for row in grid:
        if (row["shape"], row["split"]) == (recipe, split) and row["knn_top1"] is not None:
            found.setdefault(row["implementation"], {}).setdefault(row["budget_cpu_s"], []).append(row)
    return {name: dict(sorted(by_compute.items())) for name, by_compute in sorted(found.items())}


def table(found: dict[str, dict[float, list[rows.Row]]]) -> str:
    """Format the mean kNN scores as Markdown: a method a row, a budget a column.

    Beside it half the range, the epochs that fit, and the mean of the CPU-seconds that were used.
    """
    budgets = sorted({cpu_s for by_compute in found.values() for cpu_s in by_compute})
    lines = [["method", *(f"{cpu_s:g} CPU-s" for cpu_s in budgets)], ["---"] * (len(budgets) + 1)]
    for name, by_compute in found.items():
        lines.append([name, *(_shown(by_compute.get(cpu_s, [])) for cpu_s in budgets)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(runs: Sequence[rows.Row]) -> str:
    if not runs:
        return ""
    scores = [row["knn_top1"] for row in runs]
    spread = f" ± {(max(scores) - min(scores)) / 2:.1f}" if len(scores) > 1 else ""
    used_s = statistics.fmean(row["cpu_s"] for row in runs)
    return f"{statistics.fmean(scores):.1f}{spread} ({runs[0]['epochs']:.3g} ep., {used_s:.0f} s)"


def plot(found: dict[str, dict[float, list[rows.Row]]], path: Path) -> None:
    """Draw the mean score over the compute that was used, a line a method, with the runs as dots."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and only this needs it

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, by_compute in found.items():
        means = [statistics.fmean(row["knn_top1"] for row in runs) for runs in by_compute.values()]
        used_s = [statistics.fmean(row["cpu_s"] for row in runs) for runs in by_compute.values()]
        (line,) = axes.plot(used_s, means, "-", lw=1.5)
        points = [(row["cpu_s"], row["knn_top1"]) for runs in by_compute.values() for row in runs]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), label=name, ms=4)
    axes.set_xscale("log")
    budgets = sorted({cpu_s for by_compute in found.values() for cpu_s in by_compute})
    axes.set_xticks(budgets, [f"{cpu_s:g}" for cpu_s in budgets])
    axes.minorticks_off()
    axes.set_xlabel("compute, CPU-seconds of one thread")
    axes.set_ylabel("kNN top-1, %")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw(args: argparse.Namespace) -> None:
    """Print the table of a recipe, and draw it to --plot."""
    found = summary(rows.read(args.json), recipe=args.recipe, split=args.split)
    print(table(found))
    if args.plot:
        plot(found, args.plot)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of both commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="complete a grid; the same command goes on after an interruption")
    running.add_argument("recipe", help="the recipe that the methods change")
    running.add_argument("--data", type=Path, required=True, metavar="TRAIN.beton")
    running.add_argument("--test", type=Path, metavar="TEST.beton", help="train on all of TRAIN and score on TEST")
    running.add_argument(
        "--method", type=parse_method, action="append", required=True, metavar='"NAME: setting=value --flag=value"'
    )
    running.add_argument("--cpu-s", type=float, nargs="+", required=True, metavar="S", help="CPU-seconds of training")
    running.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    running.add_argument("--work", type=Path, default=Path("runs/quality"), metavar="DIR", help="for runs and halves")
    running.set_defaults(command=run)
    drawing = commands.add_parser("draw", help="print the table of a recipe and draw its plot")
    drawing.add_argument("recipe")
    drawing.add_argument("--split", choices=["held out", "test"], default="held out")
    drawing.add_argument("--plot", type=Path, metavar="OUT.png")
    drawing.set_defaults(command=draw)
    for command in (running, drawing):
        command.add_argument("--json", type=Path, default=ROWS, metavar="ROWS.jsonl")
    return parser


if __name__ == "__main__":
    given = build_parser().parse_args()
    given.command(given)
