"""The command fastbyol-eval table, which runs an ablation table of the paper and writes its page."""

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

from fastbyol.ablations import page
from fastbyol.ablations.paper import TABLES, Cell, Table
from fastbyol.ablations.runs import Job, RunCrashed, RunResult, read_result, score_linear, train_run
from fastbyol.beton import Reader
from fastbyol.budget import parse_duration
from fastbyol.cli.cache import Cache
from fastbyol.errors import ConfigError, require
from fastbyol.evaluate.features import check_classes
from fastbyol.recipes import named
from fastbyol.system.command_line import BAD_INPUT, DONE, INTERRUPTED, fail

BAR = "{percentage:3.0f}%|{bar}| {n:.2f} of {total:g} runs, {desc} [{elapsed}<{remaining}]"


def list_jobs(args: argparse.Namespace, table: Table) -> list[Job]:
    """List the runs of a table seed by seed, so that a complete table with one seed exists early."""
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


def select_jobs(jobs: Sequence[Job], args: argparse.Namespace, table: Table) -> list[Job]:
    """Select the jobs of the cells given by --cells."""
    if args.cells is None:
        return list(jobs)
    cells = [table.cells[number - 1] for number in args.cells]
    return [job for job in jobs if job.cell in cells]


def check_arguments(args: argparse.Namespace, table: Table) -> None:
    """Raise ConfigError if a run would fail: checks cells, changes, budget and matplotlib."""
    require(
        importlib.util.find_spec("matplotlib") is not None,
        "matplotlib is missing, and the plot of a table needs it; pip install matplotlib",
    )
    beyond = [number for number in args.cells or () if number > len(table.cells)]
    require(
        not beyond,
        f"--cells has {beyond}, but the table has {len(table.cells)} cells; give numbers from 1 to {len(table.cells)}",
    )
    for cell in table.cells:
        named(f"{args.base}+{cell.change}" if cell.change else args.base)
    if args.budget is not None:
        parse_duration(args.budget)


def complete_job(job: Job, args: argparse.Namespace, *, on_progress: Callable[[float], None]) -> RunResult | None:
    """Run what a job still lacks, the training and, with --linear, the linear score; raise like cells.train_run."""
    if read_result(job) is None:
        train_run(job, on_progress=on_progress)
    result = read_result(job)
    if args.linear and result is not None and result.status == DONE and result.linear_top1 is None:
        score_linear(job, on_progress=on_progress)
        result = read_result(job)
    return result


def run_jobs(jobs: Sequence[Job], args: argparse.Namespace, table: Table, *, settings: str) -> list[RunCrashed]:
    """Complete the selected jobs and rewrite the page of the table after each; return the crashes."""
    out, command = _folder(args), _command(args)
    results = {job: read_result(job) for job in jobs}
    crashed: list[RunCrashed] = []

    def write() -> None:
        runs: dict[Cell, list[RunResult]] = {cell: [] for cell in table.cells}
        for job, result in results.items():
            if result is not None:
                runs[job.cell].append(result)
        page.write(out, table, runs, settings=settings, command=command)

    out.mkdir(parents=True, exist_ok=True)
    write()
    selected = select_jobs(jobs, args, table)
    with tqdm(total=len(selected), bar_format=BAR, disable=None, file=sys.stderr) as bar:
        for number, job in enumerate(selected):
            bar.set_description_str(f"{job.cell.name}, seed {job.seed}")
            if bar.disable and results[job] is None:
                print(f"{number + 1} of {len(selected)}: {job.cell.name}, seed {job.seed}", file=sys.stderr, flush=True)
            before = results[job]
            try:
                results[job] = complete_job(job, args, on_progress=partial(_show, bar, number))
            except RunCrashed as error:
                crashed.append(error)
                tqdm.write(f"fastbyol-eval: {error}", file=sys.stderr)
            if results[job] != before:
                write()
            _show(bar, number, 1.0)
    return crashed


def _show(bar: tqdm[Any], done: int, progress: float) -> None:
    bar.n = done + progress
    bar.refresh()


def main(args: argparse.Namespace) -> int:
    """Run the table and return the exit status: 0 if every run has ended, 2 after a crash, 75 if interrupted.

    A run that diverged has ended; a run that crashed is tried again by the same command. Raises ConfigError, BetonError
    or OSError for bad input.
    """
    base = named(args.base)
    table = TABLES[args.name](base)
    check_arguments(args, table)
    cache = Cache(args.cache or _folder(args) / "cache", tuple(args.prep), command="fastbyol-eval")
    args.data, args.val = cache.pair(args.data, args.val)
    with Reader(args.data) as train, Reader(args.val) as val:
        check_classes(train.labelled(), val.labelled())
    out = _folder(args)
    length = f"a budget of {args.budget}" if args.budget else f"{args.epochs or base.epochs:g} epochs"
    settings = f"Recipe {args.base}, {Path(args.data).name}, {length} a run"
    try:
        crashed = run_jobs(list_jobs(args, table), args, table, settings=settings)
    except KeyboardInterrupt:
        print("fastbyol-eval: interrupted; continue with the same command", file=sys.stderr)
        return INTERRUPTED
    if crashed:
        error = ConfigError(
            f"{len(crashed)} runs crashed, the last: {crashed[-1]}; repeat the command to try them again"
        )
        return fail("fastbyol-eval", error, status=BAD_INPUT)
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
