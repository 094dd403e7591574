"""The page of a table, Markdown and a plot: our scores beside the paper's, and where their orders differ."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from fastbyol.ablations.paper import Cell, Table
from fastbyol.ablations.runs import RunResult
from fastbyol.storage import files
from fastbyol.system.command_line import DIVERGED, DONE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP_POINTS = 2.0  # the order of two cells is compared if the paper's scores differ by at least this
BLUE, ORANGE, GRAY = "#2f6db5", "#d9822b", "#8a8f98"
Results = Mapping[Cell, Sequence[RunResult]]
Score = Callable[[Sequence[RunResult]], list[float]]


def knn_scores(results: Sequence[RunResult]) -> list[float]:
    """Return the kNN scores of the runs that have one."""
    return [run.knn_top1 for run in results if run.knn_top1 is not None]


def linear_scores(results: Sequence[RunResult]) -> list[float]:
    """Return the linear scores of the runs that have one."""
    return [run.linear_top1 for run in results if run.linear_top1 is not None]


def headline_score(results: Results) -> tuple[str, Score]:
    """Choose the score to compare with the paper's: linear, as in the paper, if all finished runs have it, else kNN."""
    runs = [run for cell_runs in results.values() for run in cell_runs if run.status == DONE]
    return ("linear", linear_scores) if runs and len(linear_scores(runs)) == len(runs) else ("kNN", knn_scores)


def scaled_stds(results: Sequence[RunResult]) -> list[float]:
    """Return the embedding std times root D at the end of the runs: 1 when healthy, 0 when collapsed."""
    return [run.scaled_std for run in results if run.scaled_std is not None]


def disagreements(results: Results) -> tuple[int, list[tuple[Cell, Cell]]]:
    """Compare all pairs of scored cells at least GAP_POINTS apart in the paper.

    Returns the number of pairs and the pairs whose order differs here; the cell that is better in the paper comes
    first.
    """
    _, score = headline_score(results)
    means = {cell: statistics.fmean(score(runs)) for cell, runs in results.items() if score(runs)}
    compared, wrong = 0, []
    for pair in combinations([cell for cell in means if cell.paper is not None], 2):
        better, worse = sorted(pair, key=lambda cell: cell.paper or 0.0, reverse=True)
        if (better.paper or 0.0) - (worse.paper or 0.0) >= GAP_POINTS:
            compared += 1
            if means[better] <= means[worse]:
                wrong.append((better, worse))
    return compared, wrong


def write(folder: Path, table: Table, results: Results, *, settings: str, command: str) -> Path:
    """Write table.md and table.png into a folder and return the page's path; cells without a finished run show "-"."""
    figure = plot(table, results)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with files.replacement(folder / "table.png") as file:
        file.write(buffer.getvalue())
    page = folder / "table.md"
    files.write(page, markdown(table, results, settings=settings, command=command))
    return page


def markdown(table: Table, results: Results, *, settings: str, command: str) -> str:
    """Return the page as Markdown."""
    has_linear = any(map(linear_scores, results.values()))
    scored_by = "kNN and of a linear classifier on cached representations" if has_linear else "kNN"
    initial = {run.knn_top1_random_init for runs in results.values() for run in runs} - {None}
    lines = [
        f"# {table.title}",
        "",
        f"{settings}. Paper: {table.source}, linear top-1 on ImageNet after 300 epochs; here: top-1 of {scored_by}, "
        "mean over seeds ± half the range, as in the paper.",
        "Embedding std is that of the last targets, times √D: 1 when healthy, 0 when collapsed. With a constant target "
        "it says nothing about the online network.",
        "",
        f"    {command}",
        "",
        f"| cell | change | paper, % | kNN, % |{' linear, % |' * has_linear} embedding std · √D | runs |",
        f"|---|---|---|---|{'---|' * has_linear}---|---|",
        *(_row(cell, results.get(cell, ()), has_linear=has_linear) for cell in table.cells),
        "",
    ]
    if initial:
        values = sorted(value for value in initial if value is not None)
        lines += [f"Random init: kNN {_with_spread(values)} %.", ""]
    compared, wrong = disagreements(results)
    if compared:
        lines += [
            f"Of {compared} pairs of cells that are {GAP_POINTS:g} points or more apart in the paper, "
            f"{compared - len(wrong)} have the paper's order by {headline_score(results)[0]} score."
        ]
        lines += [f"- Reversed: **{better.name}** over {worse.name}." for better, worse in wrong]
        lines.append("")
    return "\n".join([*lines, "![The table as a plot](table.png)", ""])


def _row(cell: Cell, runs: Sequence[RunResult], *, has_linear: bool) -> str:
    paper = "-" if cell.paper is None else f"{cell.paper:g}"
    ends = f"{len(runs)}"
    diverged = sum(run.status == DIVERGED for run in runs)
    if diverged:
        ends += f", {diverged} diverged or collapsed"
    change = f"`{' '.join([cell.change, *cell.flags]).strip()}`" if cell.change or cell.flags else "none"
    std = f"{statistics.fmean(scaled_stds(runs)):.2f}" if scaled_stds(runs) else "-"
    ours = [_with_spread(knn_scores(runs)), *([_with_spread(linear_scores(runs))] if has_linear else [])]
    return f"| {cell.name} | {change} | {paper} | {' | '.join(ours)} | {std} | {ends} |"


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def plot(table: Table, results: Results) -> Figure:
    """Draw the paper's scores, ours and the embedding std, one row per cell; dots are runs."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - 0.3 s that no other command of fastbyol-eval should pay

    figure = Figure(figsize=(11, 1.4 + 0.34 * len(table.cells)), layout="constrained")
    paper, ours, std = figure.subplots(1, 3, sharey=True, width_ratios=(2, 2, 1))
    places = range(len(table.cells))
    paper.barh(places, [cell.paper or 0.0 for cell in table.cells], color=GRAY)
    paper.set_title(f"paper, {table.source}: ImageNet linear top-1, %", fontsize=9)
    name, score = headline_score(results)
    _dots(ours, [score(results.get(cell, ())) for cell in table.cells], BLUE)
    ours.set_title(f"here: {name} top-1, %{' (dashed: random init)' * (score is knn_scores)}", fontsize=9)
    initial = [run.knn_top1_random_init for runs in results.values() for run in runs if run.knn_top1_random_init]
    if initial and score is knn_scores:
        ours.axvline(statistics.fmean(initial), color=ORANGE, ls="--", lw=1)
    _dots(std, [scaled_stds(results.get(cell, ())) for cell in table.cells], BLUE)
    std.set_title("embedding std · √D", fontsize=9)
    std.set_xlim(0, 1.1)
    paper.set_yticks(list(places), [cell.name for cell in table.cells], fontsize=8)
    paper.invert_yaxis()
    figure.suptitle(table.title, fontsize=11)
    return figure


def _dots(ax: Axes, rows: Sequence[Sequence[float]], color: str) -> None:
    ax.barh(range(len(rows)), [statistics.fmean(row) if row else 0.0 for row in rows], color=color, alpha=0.35)
    points = [(value, place) for place, row in enumerate(rows) for value in row]
    ax.plot([value for value, _ in points], [place for _, place in points], "o", color=color, ms=4)
    ax.grid(alpha=0.25, axis="x")
