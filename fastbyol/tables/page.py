"""Know how a table looks: Markdown and a plot, our scores beside the paper's, and where their orders disagree."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from fastbyol import atomic
from fastbyol.commandline import DIVERGED, DONE
from fastbyol.tables.cells import Outcome
from fastbyol.tables.paper import Cell, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 2.0  # points of the paper's scores from which the order of two cells is compared
BLUE, ORANGE, GRAY = "#2f6db5", "#d9822b", "#8a8f98"
Outcomes = Mapping[Cell, Sequence[Outcome]]
Score = Callable[[Sequence[Outcome]], list[float]]


def scores(outcomes: Sequence[Outcome]) -> list[float]:
    """Give the kNN scores of a cell's runs, those that have one."""
    return [outcome.knn_top1 for outcome in outcomes if outcome.knn_top1 is not None]


def linear(outcomes: Sequence[Outcome]) -> list[float]:
    """Give the linear scores of a cell's runs, those that have one."""
    return [outcome.linear_top1 for outcome in outcomes if outcome.linear_top1 is not None]


def headline(outcomes: Outcomes) -> tuple[str, Score]:
    """Choose what is compared with the paper: linear scores, as the paper's are, where every scored run has one."""
    runs = [run for of_cell in outcomes.values() for run in of_cell if run.status == DONE]
    return ("linear", linear) if runs and len(linear(runs)) == len(runs) else ("kNN", scores)


def spreads(outcomes: Sequence[Outcome]) -> list[float]:
    """Give the embedding std times root D at the end of a cell's runs: 1 when healthy, 0 when collapsed."""
    return [outcome.spread for outcome in outcomes if outcome.spread is not None]


def disagreements(outcomes: Outcomes) -> tuple[int, list[tuple[Cell, Cell]]]:
    """Compare every two scored cells at least GAP apart in the paper: how many, and those in the other order here.

    The cell that is better in the paper comes first.
    """
    _, score = headline(outcomes)
    means = {cell: statistics.fmean(score(runs)) for cell, runs in outcomes.items() if score(runs)}
    compared, wrong = 0, []
    for pair in combinations([cell for cell in means if cell.paper is not None], 2):
        better, worse = sorted(pair, key=lambda cell: cell.paper or 0.0, reverse=True)
        if (better.paper or 0.0) - (worse.paper or 0.0) >= GAP:
            compared += 1
            if means[better] <= means[worse]:
                wrong.append((better, worse))
    return compared, wrong


def write(folder: Path, table: Table, outcomes: Outcomes, *, settings: str, command: str) -> Path:
    """Write table.md and table.png into a folder; return the page. Cells without a finished run show as missing."""
    figure = plot(table, outcomes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with atomic.replacement(folder / "table.png") as file:
        file.write(buffer.getvalue())
    page = folder / "table.md"
    atomic.write(page, markdown(table, outcomes, settings=settings, command=command))
    return page


def markdown(table: Table, outcomes: Outcomes, *, settings: str, command: str) -> str:
    """Write the page."""
    has_linear = any(map(linear, outcomes.values()))
    taken = "kNN and of a linear classifier on cached representations" if has_linear else "kNN"
    initial = {run.knn_top1_random_init for runs in outcomes.values() for run in runs} - {None}
    lines = [
        f"# {table.title}",
        "",
        f"{settings}. Paper: {table.source}, linear top-1 on ImageNet after 300 epochs; here: top-1 of {taken}, mean "
        "over seeds ± half the distance from the least to the greatest, as the paper gives it.",
        "Embedding std is that of the last targets, times √D: 1 when healthy, 0 when collapsed; a constant target's "
        "says nothing of the online network.",
        "",
        f"    {command}",
        "",
        f"| cell | change | paper, % | kNN, % |{' linear, % |' * has_linear} embedding std · √D | runs |",
        f"|---|---|---|---|{'---|' * has_linear}---|---|",
        *(_row(cell, outcomes.get(cell, ()), has_linear=has_linear) for cell in table.cells),
        "",
    ]
    if initial:
        values = sorted(value for value in initial if value is not None)
        lines += [f"Random init: kNN {_with_spread(values)} %.", ""]
    compared, wrong = disagreements(outcomes)
    if compared:
        lines += [
            f"Of {compared} pairs of cells that lie {GAP:g} points or more apart in the paper, {compared - len(wrong)} "
            f"come in the paper's order by {headline(outcomes)[0]} score."
        ]
        lines += [f"- Not so: **{better.name}** over {worse.name}." for better, worse in wrong]
        lines.append("")
    return "\n".join([*lines, "![The table as a plot](table.png)", ""])


def _row(cell: Cell, runs: Sequence[Outcome], *, has_linear: bool) -> str:
    paper = "-" if cell.paper is None else f"{cell.paper:g}"
    ends = f"{len(runs)}"
    diverged = sum(run.status == DIVERGED for run in runs)
    if diverged:
        ends += f", {diverged} diverged or collapsed"
    change = f"`{' '.join([cell.change, *cell.flags]).strip()}`" if cell.change or cell.flags else "none"
    std = f"{statistics.fmean(spreads(runs)):.2f}" if spreads(runs) else "-"
    ours = [_with_spread(scores(runs)), *([_with_spread(linear(runs))] if has_linear else [])]
    return f"| {cell.name} | {change} | {paper} | {' | '.join(ours)} | {std} | {ends} |"


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def plot(table: Table, outcomes: Outcomes) -> Figure:
    """Draw the paper's scores, ours and the embedding std, a line a cell; dots are runs."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - .3 s that no other command of fastbyol-eval should pay

    figure = Figure(figsize=(11, 1.4 + 0.34 * len(table.cells)), layout="constrained")
    paper, ours, std = figure.subplots(1, 3, sharey=True, width_ratios=(2, 2, 1))
    places = range(len(table.cells))
    paper.barh(places, [cell.paper or 0.0 for cell in table.cells], color=GRAY)
    paper.set_title(f"paper, {table.source}: ImageNet linear top-1, %", fontsize=9)
    name, score = headline(outcomes)
    _dots(ours, [score(outcomes.get(cell, ())) for cell in table.cells], BLUE)
    ours.set_title(f"here: {name} top-1, %{' (dashed: random init)' * (score is scores)}", fontsize=9)
    initial = [run.knn_top1_random_init for runs in outcomes.values() for run in runs if run.knn_top1_random_init]
    if initial and score is scores:
        ours.axvline(statistics.fmean(initial), color=ORANGE, ls="--", lw=1)
    _dots(std, [spreads(outcomes.get(cell, ())) for cell in table.cells], BLUE)
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
