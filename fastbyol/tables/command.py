"""fastbyol-eval table: run an ablation table of the paper, cell by cell and seed by seed, and write it."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastbyol.beton import Reader
from fastbyol.budget import parse_duration
from fastbyol.commandline import BAD_INPUT, DONE, INTERRUPTED, fail, whole_number
from fastbyol.config import ConfigError, require
from fastbyol.evaluate.features import check_classes
from fastbyol.recipes import named
from fastbyol.tables import page
from fastbyol.tables.cells import Crashed, Job, Outcome, carry_out, outcome, score_linearly
from fastbyol.tables.paper import TABLES, Cell, Table

BAR = "{percentage:3.0f}%|{bar}| {n:.2f} of {total:g} runs, {desc} [{elapsed}<{remaining}]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line (a contract: names and meanings stay)."""
    parser.add_argument("name", metavar="NAME", choices=list(TABLES), help=f"one of {', '.join(TABLES)}")
    parser.add_argument("--base", required=True, metavar="RECIPE", help="the recipe that each cell changes")
    parser.add_argument("--data", required=True, metavar="F.beton", help="training images, labelled")
    parser.add_argument("--val", required=True, metavar="F.beton", help="labelled images to score with kNN")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--budget", metavar="3m", help="wall-clock of each run")
    length.add_argument("--epochs", type=float, metavar="N", help="length of each run (default: the recipe's)")
    parser.add_argument("--seeds", type=whole_number, default=3, metavar="N", help="runs a cell, of seeds 0 to N-1")
    parser.add_argument(
        "--cells", type=whole_number, nargs="+", metavar="N", help="run these alone, counted from 1 (default: all)"
    )
    parser.add_argument(
        "--linear", action="store_true", help="also score each run by a linear classifier on cached representations"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the table (default: runs/table-NAME)")
    parser.add_argument(
        "--with",
        dest="more",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="FLAGS",
        help="all that follows goes to fastbyol-train: --with --workers 8 --device cuda",
    )


def jobs_of(args: argparse.Namespace, table: Table) -> list[Job]:
    """List the runs of a table, seed by seed, so that a whole table stands early."""
    out = _folder(args)
    files = [f"--data={args.data}", f"--val={args.val}"]

    def words(cell: Cell, seed: int) -> tuple[str, ...]:
        recipe = f"{args.base}+{cell.change}" if cell.change else args.base
        return (recipe, *files, *_lengths(args), f"--seed={seed}", *cell.flags, *args.more)

    return [
        Job(cell, seed, out / cell.folder / f"seed{seed}", words(cell, seed))
        for seed in range(args.seeds)
        for cell in table.cells
    ]


def chosen(jobs: Sequence[Job], args: argparse.Namespace, table: Table) -> list[Job]:
    """Take those that --cells asks for."""
    if args.cells is None:
        return list(jobs)
    cells = [table.cells[number - 1] for number in args.cells]
    return [job for job in jobs if job.cell in cells]


def check(args: argparse.Namespace, table: Table) -> None:
    """Raise ConfigError or BetonError for what would let a run fail: a cell, a change, the files, the budget."""
    require(
        importlib.util.find_spec("matplotlib") is not None,
        "the plot of a table needs the package matplotlib; pip install matplotlib",
    )
    beyond = [number for number in args.cells or () if number > len(table.cells)]
    require(not beyond, f"--cells {beyond}, but the table has {len(table.cells)}; give numbers from 1 to that")
    for cell in table.cells:
        named(f"{args.base}+{cell.change}" if cell.change else args.base)
    if args.budget is not None:
        parse_duration(args.budget)
    with Reader(args.data) as train, Reader(args.val) as val:
        check_classes(train, val)


def finish(job: Job, args: argparse.Namespace, *, watch: Callable[[float], None]) -> Outcome | None:
    """Do what a job still lacks: its run, its linear score where asked for; raises as cells.carry_out."""
    if outcome(job) is None:
        carry_out(job, watch=watch)
    how = outcome(job)
    if args.linear and how is not None and how.status == DONE and how.linear_top1 is None:
        score_linearly(job, watch=watch)
        how = outcome(job)
    return how


def carry_out_all(jobs: Sequence[Job], args: argparse.Namespace, table: Table, *, settings: str) -> list[Crashed]:
    """Finish every job asked for, write the table of all after each; return what crashed."""
    out, command = _folder(args), _command(args)
    ended = {job: outcome(job) for job in jobs}
    crashed: list[Crashed] = []

    def write() -> None:
        runs: dict[Cell, list[Outcome]] = {cell: [] for cell in table.cells}
        for job, how in ended.items():
            if how is not None:
                runs[job.cell].append(how)
        page.write(out, table, runs, settings=settings, command=command)

    out.mkdir(parents=True, exist_ok=True)
    write()
    asked = chosen(jobs, args, table)
    with tqdm(total=len(asked), bar_format=BAR, disable=None, file=sys.stderr) as bar:
        for number, job in enumerate(asked):
            bar.set_description_str(f"{job.cell.name}, seed {job.seed}")
            if bar.disable and ended[job] is None:
                print(f"{number + 1} of {len(asked)}: {job.cell.name}, seed {job.seed}", file=sys.stderr, flush=True)
            before = ended[job]
            try:
                ended[job] = finish(job, args, watch=partial(_show, bar, number))
            except Crashed as error:
                crashed.append(error)
                tqdm.write(f"fastbyol-eval: {error}", file=sys.stderr)
            if ended[job] != before:
                write()
            _show(bar, number, 1.0)
    return crashed


def _show(bar: tqdm[Any], done: int, progress: float) -> None:
    bar.n = done + progress
    bar.refresh()


def main(args: argparse.Namespace) -> int:
    """Run the table; return 0 when every run has ended, 2 on bad input or a crash, 75 when interrupted.

    A run that diverged has ended; one that crashed is tried again by the same command. Raises ConfigError, BetonError
    or OSError for bad input.
    """
    base = named(args.base)
    table = TABLES[args.name](base)
    check(args, table)
    out = _folder(args)
    length = f"a budget of {args.budget}" if args.budget else f"{args.epochs or base.epochs:g} epochs"
    settings = f"Recipe {args.base}, {Path(args.data).name}, {length} a run"
    try:
        crashed = carry_out_all(jobs_of(args, table), args, table, settings=settings)
    except KeyboardInterrupt:
        print("fastbyol-eval: interrupted; continue with the same command", file=sys.stderr)
        return INTERRUPTED
    if crashed:
        told = ConfigError(f"{len(crashed)} runs crashed, the last: {crashed[-1]}; the same command tries them again")
        return fail("fastbyol-eval", told, status=BAD_INPUT)
    print(f"table: {out / 'table.md'}")
    return DONE


def _folder(args: argparse.Namespace) -> Path:
    out: Path = args.out or Path("runs") / f"table-{args.name}"
    return out


def _lengths(args: argparse.Namespace) -> list[str]:
    budget = [] if args.budget is None else [f"--budget={args.budget}"]
    return [*budget, *([] if args.epochs is None else [f"--epochs={args.epochs:g}"])]


def _command(args: argparse.Namespace) -> str:
    words = ["fastbyol-eval", "table", args.name, f"--base={args.base}", f"--data={args.data}", f"--val={args.val}"]
    words += [*_lengths(args), f"--seeds={args.seeds}", *["--linear"] * args.linear, f"--out={_folder(args)}"]
    return shlex.join([*words, *(["--with", *args.more] if args.more else [])])
