"""The report of a run: one self-contained HTML page with its configuration, progress and results."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastbyol.beton import Reader
from fastbyol.budget import format_duration
from fastbyol.config import Config
from fastbyol.evaluate.neighbours import Neighbours
from fastbyol.report import curves, pictures, settings, timeline
from fastbyol.report.curves import SERIES
from fastbyol.report.style import STYLE
from fastbyol.storage import files

__all__ = ["SERIES", "write"]

CLOSING = {  # keys of closing_s -> labels on the page
    "checkpoint": "a checkpoint",
    "recalibrate": "the recalibration",
    "export": "the export",
    "evaluate": "the evaluation",
    "report": "the report",
    "result": "the result",
}
COUNTERS = {"skipped_steps": ("step", "skipped for inf or NaN"), "skipped_samples": ("sample", "that did not decode")}


def write(  # noqa: PLR0913 - everything that a page shows
    path: Path,
    config: Config,
    *,
    train: Reader,
    rows: Sequence[dict[str, Any]],
    result: dict[str, Any] | None,
    val: Reader | None = None,
    neighbours: Sequence[Neighbours] = (),
    plan: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the page atomically from the rows of metrics.jsonl and the result, None for an unfinished run.

    Missing data is left out: rows may lack any series, `result` and `plan` any key. The plan has, in seconds, budget_s,
    startup_s, rehearsal_s, calibration_s, reserve_s, step_s and closing_s (a dict with the keys of CLOSING); and
    epochs_that_fit, base_lr and tau_base. neighbours index samples of `val` and `train`. warnings are those after the
    last row. Raises OSError.
    """
    name = html.escape(config.recipe.name)
    shown_neighbours = pictures.neighbour_rows(neighbours, train=train, val=val) if neighbours and val else ""
    parts = (
        _header(config, train),
        _outcome(config, rows, result, plan),
        _section("The budget", *_budget(rows, result, plan)),
        _section(
            "Training", "", f"<div class=charts>{drawn}</div>" if (drawn := _curves(config, rows, result)) else ""
        ),
        _section("Events", *_events(rows, warnings)),
        _section(
            "What the networks see",
            "Each column is one image of the first batch, with its first and its second view.",
            pictures.sample_views(config, train),
        ),
        _section(
            "Nearest neighbours",
            "Left, a validation image; right, its nearest training images under the encoder. The queries are the first "
            "images of their classes, not chosen by result. ✓ same class, ✗ another class.",
            shown_neighbours,
        ),
        _section("Settings", "", settings.as_html(config, plan)),
    )
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{name}, fastbyol</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    files.write(path, page)


def _section(title: str, note: str, body: str) -> str:
    if not body:
        return ""
    note = f"<p>{note}</p>" if note else ""
    return f"<section><h2>{title}</h2>{note}{body}</section>"


def _header(config: Config, train: Reader) -> str:
    encoder, recipe = config.recipe.encoder, config.recipe
    facts = {
        "encoder": f"{encoder.arch}, width {encoder.width:g}",
        "images": f"{len(train):,}",
        "length": _length(config),
        "batch": str(recipe.batch_size),
        "views": f"{recipe.crop_px} px",
        "on": f"{config.device}, {config.precision}",
        "seed": str(config.seed),
    }
    items = "".join(f"<li><span>{name}</span>{html.escape(value)}" for name, value in facts.items())
    return (
        f"<header><p class=over>fastbyol run</p><h1>{html.escape(recipe.name)}</h1>"
        f"<p><code>{html.escape(config.data)}</code></p><ul class=facts>{items}</ul></header>"
    )


def _length(config: Config) -> str:
    if config.deadline is not None:
        return f"until {datetime.fromtimestamp(config.deadline).isoformat(' ', 'minutes')}"
    if config.budget_s is not None:
        return f"{format_duration(config.budget_s)}, start to exit"
    return f"{config.epochs:g} epochs"


def _outcome(
    config: Config, rows: Sequence[dict[str, Any]], result: dict[str, Any] | None, plan: dict[str, Any] | None
) -> str:
    """Show the score first, beside that of the initial encoder, then the figures of the run."""
    last = rows[-1] if rows else {}
    cards = _numbers(config, last, result or {}, plan or {})
    numbers = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in cards)
    score = (result or {}).get("knn_top1")
    if result is None:
        at = f" Its progress is {100 * last['progress']:.0f} %." if "progress" in last else ""
        lead = f"<div class=card><b>This run has not finished.</b><p class=note>{at}</p></div>"
    elif score is None:
        lead = (
            "<div class=card><b>Not scored.</b><p class=note>Give --val a labelled file to score the encoder by its "
            "nearest neighbours.</p></div>"
        )
    else:
        lead = _score(score, result.get("knn_top1_random_init"))
    return f"<div class=lead>{lead}<div class='card numbers'>{numbers}</div></div>" if numbers else lead


def _score(score: float, before: float | None) -> str:
    bars = [("before", "random init", before), ("after", "trained", score)]
    lines = "".join(
        f'<span>{name}</span><div class={kind}><span style="width:{value:.2f}%"></span></div><span>{value:.1f} %</span>'
        for kind, name, value in bars
        if value is not None
    )
    return (
        f"<div class='card score'><b>{score:.1f} %</b><p>of validation images classified right by their nearest "
        f"neighbours (kNN top-1)</p><div class=compare>{lines}</div></div>"
    )


def _numbers(
    config: Config, last: dict[str, Any], result: dict[str, Any], plan: dict[str, Any]
) -> list[tuple[str, str]]:
    """List speed, length, time, loss, memory and utilisation, as far as known, as (value, label)."""
    of_8 = ", of 8" if settings.loss_ends_at_8(config) else ""
    images_per_s = result.get("images_per_s", last.get("images_per_s"))
    epochs = result.get("epochs", last.get("epoch"))
    found: list[tuple[str, str] | None] = [
        None if images_per_s is None else (f"{images_per_s:,.0f}", "images per second"),
        None if epochs is None else (f"{epochs:.2f}", "epochs"),
        None if "step" not in last else (f"{last['step']:,}", "steps"),
        None if "train_s" not in result else (timeline.seconds(result["train_s"]), "of training"),
        None if "loss" not in last else (f"{last['loss']:.3f}", f"last loss{of_8}"),
        None if "peak_gib" not in last else (f"{last['peak_gib']:.2f} GiB", "peak memory"),
        None if "mfu" not in last else (f"{100 * last['mfu']:.1f} %", "of the GPU's peak"),
    ]
    if "elapsed_s" in result and plan.get("budget_s"):
        left_s = plan["budget_s"] - result["elapsed_s"]
        found.append((timeline.seconds(abs(left_s)), "before the deadline" if left_s >= 0 else "after the deadline"))
    return [card for card in found if card is not None]


def _budget(
    rows: Sequence[dict[str, Any]], result: dict[str, Any] | None, plan: dict[str, Any] | None
) -> tuple[str, str]:
    actual = timeline.actual_timeline(rows, result, plan)
    if actual is None:
        return "", ""
    known_plan = plan or {}
    labels = {
        "epochs that fit": ("epochs_that_fit", "{:.3g}"),
        "base learning rate": ("base_lr", "{:.3g}"),
        "τ at the start": ("tau_base", "{:.4g}"),
        "a step": ("step_s", "{:.3g} s"),
    }
    known = [
        (name, form.format(known_plan[key])) for name, (key, form) in labels.items() if known_plan.get(key) is not None
    ]
    pieces = known_plan.get("closing_s") or {}
    known += [(name, f"{pieces[piece]:.2g} s") for piece, name in CLOSING.items() if pieces.get(piece)]
    planned = timeline.plan_timeline(plan)
    bars = timeline.as_html(planned, actual, budget_s=known_plan.get("budget_s"))
    note = (
        "The plan, made before the first step, and the actual times."
        if planned
        else "Where the time went, from the start of the process."
    )
    if not known:
        return note, bars
    lines = "".join(f"<tr><td>{name}<td>{value}" for name, value in known)
    estimates = f"<div><table class=phases><tr><th>measured before training<th>plan{lines}</table></div>"
    return note, f"<div class=split><div>{bars}</div>{estimates}</div>"


def _curves(config: Config, rows: Sequence[dict[str, Any]], result: dict[str, Any] | None) -> str:
    loss_note = "both directions, 0 to 8" if settings.loss_ends_at_8(config) else ""
    return curves.figures(rows, result, healthy_std=config.recipe.head.out**-0.5, loss_note=loss_note)


def _events(rows: Sequence[dict[str, Any]], warnings: Sequence[str]) -> tuple[str, str]:
    """List skipped steps, replaced samples and warnings, each with the time of the row that reported it."""
    if not rows and not warnings:
        return "", ""
    events: list[tuple[float, str]] = []
    for name, (thing, why) in COUNTERS.items():
        counts = [int(row.get(name) or 0) for row in rows]
        if any(counts[-1:]):
            first = next(row for row, count in zip(rows, counts, strict=True) if count)
            things = thing if counts[-1] == 1 else f"{thing}s"
            events.append(
                (first.get("elapsed_s", 0.0), f"{counts[-1]:,} {things} {why}, the first by step {first['step']:,}")
            )
    for row in rows:
        events += [(row.get("elapsed_s", 0.0), str(text)) for text in row.get("warnings", ())]
    last_s = rows[-1].get("elapsed_s", 0.0) if rows else 0.0
    events += [(last_s, text) for text in warnings]
    if not events:
        return "", "<p class=note>No skipped steps, no replaced images, no warnings.</p>"
    lines = [
        f"<li><span>{timeline.seconds(at_s)}</span>{html.escape(text)}"
        for at_s, text in sorted(events, key=itemgetter(0))
    ]
    return "", f"<ul class=events>{''.join(lines)}</ul>"
