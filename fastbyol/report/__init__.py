"""The report of a run: one self-contained HTML page with its configuration, progress and results.

report.html and report.css hold its text and its look; the modules here compute what they show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastbyol.beton import Reader
from fastbyol.budget import format_duration
from fastbyol.config import Config
from fastbyol.evaluate.neighbours import Neighbours
from fastbyol.evaluate.protocol import Files
from fastbyol.report import curves, pictures, settings, timeline
from fastbyol.report.curves import SERIES
from fastbyol.storage import files
from fastbyol.storage.pages import render

__all__ = ["SERIES", "write"]

CLOSING = {  # keys of closing_s -> labels on the page
    "checkpoint": "a checkpoint",
    "recalibrate": "the recalibration",
    "export": "the export",
    "evaluate": "the evaluation",
    "report": "the report",
    "result": "the result",
}
ESTIMATES = {  # labels on the page -> keys of the plan and the formats of their values
    "epochs that fit": ("epochs_that_fit", "{:.3g}"),
    "base learning rate": ("base_lr", "{:.3g}"),
    "τ at the start": ("tau_base", "{:.4g}"),
    "a step": ("step_s", "{:.3g} s"),
}
MEASURES = {  # keys of measures without labels -> labels on the page and what they say
    "rankme": ("RankMe", "directions that the representations fill; 1 is a collapse"),
    "effective_rank": ("effective rank", "the same without what all images share"),
    "alignment": ("alignment", "distance of two crops of an image, from 0 (alike) to 4"),
    "uniformity": ("uniformity", "0: all images are one point; towards -4 they spread"),
}
COUNTERS = {"skipped_steps": ("step", "skipped for inf or NaN"), "skipped_samples": ("sample", "that did not decode")}


def write(  # noqa: PLR0913 - everything that a page shows
    path: Path,
    config: Config,
    *,
    train: Reader,
    rows: Sequence[dict[str, Any]],
    result: dict[str, Any] | None,
    scored: Files | None = None,
    neighbours: Sequence[Neighbours] = (),
    measures: Mapping[str, Mapping[str, float]] | None = None,
    maps: str = "",
    plan: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the page atomically from the rows of metrics.jsonl and the result, None for an unfinished run.

    Missing data is left out: rows may lack any series, `result` and `plan` any key. The plan has, in seconds, budget_s,
    startup_s, rehearsal_s, calibration_s, reserve_s, step_s and closing_s (a dict with the keys of CLOSING); and
    epochs_that_fit, base_lr and tau_base. neighbours index samples of `scored`, the bank and the images that are
    classified, which are one file without labels to score by. measures: those without labels, by the title of their
    column. maps: links to maps of images, as HTML. warnings are those after the last row. Raises OSError.
    """
    last = rows[-1] if rows else {}
    shown_neighbours = pictures.neighbour_rows(neighbours, *scored) if neighbours and scored else []
    values = dict(
        name=config.recipe.name,
        data=config.data,
        facts=_facts(config, train),
        is_unfinished=result is None,
        progress=last.get("progress"),
        scores=_scores(result or {}),
        measures=_measures(measures or {}),
        numbers=_numbers(config, last, result or {}, plan or {}),
        **_budget(rows, result, plan if config.recipe.objective.moves_target else _without_rate(plan)),
        figures=_figures(config, rows, result),
        events=_events(rows, warnings),
        strip_names=pictures.strip_names(config),
        strips=pictures.sample_views(config, train),
        neighbours=shown_neighbours,
        has_classes=any(cell.kind != "plain" for row in shown_neighbours for cell in row[1:]),
        maps=Markup(maps),
        settings=settings.table(config, plan),
    )
    page = render(Path(__file__).with_name("report.html"), values, filters={"seconds": timeline.seconds})
    files.write(path, page)


def _facts(config: Config, train: Reader) -> dict[str, str]:
    """Return the facts of the header, by label."""
    encoder, recipe = config.recipe.encoder, config.recipe
    return {
        "encoder": f"{encoder.arch}, width {encoder.width:g}",
        "images": f"{len(train):,}",
        "length": _length(config),
        "batch": str(recipe.batch_size),
        "views": ", ".join(f"{count} of {px} px" for count, px in recipe.sizes_of_views(recipe.crop_px)),
        "on": f"{config.device}, {config.precision}",
        "seed": str(config.seed),
    }


def _length(config: Config) -> str:
    if config.deadline is not None:
        return f"until {datetime.fromtimestamp(config.deadline).isoformat(' ', 'minutes')}"
    if config.budget_s is not None:
        return f"{format_duration(config.budget_s)}, start to exit"
    return f"{config.epochs:g} epochs"


def _scores(result: dict[str, Any]) -> dict[str, float]:
    """Return kNN top-1 in percent of the trained encoder and, if known, of its baselines; empty without a score."""
    if result.get("knn_top1") is None:
        return {}
    names = ("raw pixels", "random init", "at start")
    scores = {name: result.get(f"knn_top1_{name.replace(' ', '_')}") for name in names} | {
        "trained": result["knn_top1"]
    }
    return {name: score for name, score in scores.items() if score is not None}


def _measures(measures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the titles of the columns, and a row for each measure: its label, what it says and its values."""
    rows = [
        (label, says, [f"{column[name]:.3g}" if name in column else "-" for column in measures.values()])
        for name, (label, says) in MEASURES.items()
    ]
    return {"titles": list(measures), "rows": rows} if measures else {}


def _numbers(config: Config, last: dict[str, Any], result: dict[str, Any], plan: dict[str, Any]) -> dict[str, str]:
    """Return speed, length, time, loss, memory and utilisation by label, as far as known."""
    of_8 = ", of 8" if settings.loss_ends_at_8(config) else ""
    images_per_s = result.get("images_per_s", last.get("images_per_s"))
    epochs = result.get("epochs", last.get("epoch"))
    found = {
        "images per second": None if images_per_s is None else f"{images_per_s:,.0f}",
        "epochs": None if epochs is None else f"{epochs:.2f}",
        "steps": f"{last['step']:,}" if "step" in last else None,
        "of training": timeline.seconds(result["train_s"]) if "train_s" in result else None,
        f"last loss{of_8}": f"{last['loss']:.3f}" if "loss" in last else None,
        "peak memory": f"{last['peak_gib']:.2f} GiB" if "peak_gib" in last else None,
        "of the GPU's peak": f"{100 * last['mfu']:.1f} %" if "mfu" in last else None,
    }
    if "elapsed_s" in result and plan.get("budget_s"):
        left_s = plan["budget_s"] - result["elapsed_s"]
        found["before the deadline" if left_s >= 0 else "after the deadline"] = timeline.seconds(abs(left_s))
    return {label: value for label, value in found.items() if value is not None}


def _without_rate(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a plan without the rate of a target that moves, for a run that has none."""
    return plan and {name: value for name, value in plan.items() if name != "tau_base"}


def _budget(
    rows: Sequence[dict[str, Any]], result: dict[str, Any] | None, plan: dict[str, Any] | None
) -> dict[str, Any]:
    """Return both timelines with their common scale, and the plan's estimates; no timelines without rows."""
    actual, known = timeline.actual_timeline(rows, result, plan), plan or {}
    if actual is None:
        return {"timelines": {}}
    planned = timeline.plan_timeline(plan)
    timelines = {**({"Planned": planned} if planned else {}), "Actual": actual}
    longest_s = max(*(line.total_s for line in timelines.values()), known.get("budget_s") or 0.0, 1e-9)
    estimates = {
        label: form.format(known[key]) for label, (key, form) in ESTIMATES.items() if known.get(key) is not None
    }
    pieces_s = known.get("closing_s") or {}
    estimates |= {label: f"{pieces_s[piece]:.2g} s" for piece, label in CLOSING.items() if pieces_s.get(piece)}
    return {
        "timelines": timelines,
        "scale_s": longest_s,
        "colours": timeline.COLOURS,
        "phases": [phase for phase in timeline.PHASES if any(phase in line.seconds for line in timelines.values())],
        "unused_s": actual.unused_s,
        "estimates": estimates,
    }


def _figures(config: Config, rows: Sequence[dict[str, Any]], result: dict[str, Any] | None) -> list[curves.Figure]:
    directions = "both directions, " if len(config.recipe.views) == 2 else ""
    loss_note = f"{directions}0 to 8" if settings.loss_ends_at_8(config) else ""
    return curves.figures(
        rows,
        result,
        healthy_std=config.recipe.head.out**-0.5,
        loss_note=loss_note,
        moves_target=config.recipe.objective.moves_target,
    )


def _events(rows: Sequence[dict[str, Any]], warnings: Sequence[str]) -> list[tuple[float, str]] | None:
    """List skipped steps, replaced samples and warnings, each with the time of the row that reported it.

    None if there is nothing to go by: no row and no warning.
    """
    if not rows and not warnings:
        return None
    events: list[tuple[float, str]] = []
    for name, (noun, reason) in COUNTERS.items():
        counts = [int(row.get(name) or 0) for row in rows]
        if any(counts[-1:]):
            first = next(row for row, count in zip(rows, counts, strict=True) if count)
            nouns = noun if counts[-1] == 1 else f"{noun}s"
            events.append(
                (first.get("elapsed_s", 0.0), f"{counts[-1]:,} {nouns} {reason}, the first by step {first['step']:,}")
            )
    for row in rows:
        events += [(row.get("elapsed_s", 0.0), str(text)) for text in row.get("warnings", ())]
    last_s = rows[-1].get("elapsed_s", 0.0) if rows else 0.0
    events += [(last_s, text) for text in warnings]
    return sorted(events, key=itemgetter(0))
