"""Know the report of a run: one self-contained page with what was asked, how it went and what came out."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastbyol import atomic
from fastbyol.beton import Reader
from fastbyol.budget import format_duration
from fastbyol.config import Config, ViewConfig
from fastbyol.evaluate.neighbours import Neighbours
from fastbyol.report import curves, pictures, timeline
from fastbyol.report.curves import SERIES
from fastbyol.report.style import STYLE

__all__ = ["SERIES", "write"]

COUNTERS = {"skipped_steps": ("step", "skipped for inf or NaN"), "skipped_samples": ("sample", "that did not decode")}


def write(
    path: Path,
    config: Config,
    *,
    train: Reader,
    rows: Sequence[dict[str, Any]],
    result: dict[str, Any] | None,
    val: Reader | None = None,
    neighbours: Sequence[Neighbours] = (),
    plan: dict[str, Any] | None = None,
) -> None:
    """Write the page from the rows of metrics.jsonl and the result, None for a run that has not finished; atomic.

    Everything absent is left out: rows may lack any series, `result` and `plan` any key. plan, all seconds but the last
    three: budget_s, startup_s, rehearsal_s, calibration_s, reserve_s, checkpoint_s, export_s, evaluate_s, step_s;
    epochs_that_fit, base_lr, tau_base. neighbours name samples of `val` and `train`. Raises OSError.
    """
    name = html.escape(config.recipe.name)
    shown_neighbours = pictures.neighbour_rows(neighbours, train=train, val=val) if neighbours and val else ""
    parts = (
        _header(config, train),
        _outcome(rows, result, plan),
        _section("The budget", *_budget(rows, result, plan)),
        _section("Training", "", f"<div class=charts>{drawn}</div>" if (drawn := _curves(config, rows)) else ""),
        _section("What happened on the way", *_events(rows)),
        _section(
            "What the networks see",
            "Each column is one image of the first batch, its first and its second view.",
            pictures.sample_views(config, train),
        ),
        _section(
            "Nearest neighbours",
            "Left, a validation image; then the training images the encoder holds nearest to it. The queries are the "
            "first of their classes, not chosen by result. ✓ the same class, ✗ another.",
            shown_neighbours,
        ),
        _section("Settings", "", _settings(config)),
    )
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{name}, fastbyol</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    atomic.write(path, page)


def _section(title: str, note: str, body: str) -> str:
    if not body:
        return ""
    said = f"<p>{note}</p>" if note else ""
    return f"<section><h2>{title}</h2>{said}{body}</section>"


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


def _outcome(rows: Sequence[dict[str, Any]], result: dict[str, Any] | None, plan: dict[str, Any] | None) -> str:
    """Put the score first, against the encoder as it started, then what the run did."""
    last = rows[-1] if rows else {}
    cards = _numbers(last, result or {}, plan or {})
    numbers = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in cards)
    score = (result or {}).get("knn_top1")
    if result is None:
        at = f" It stands at {100 * last['progress']:.0f} % of its way." if "progress" in last else ""
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


def _numbers(last: dict[str, Any], result: dict[str, Any], plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Name what is known of: speed, length, time, waiting, memory, utilisation."""
    images_per_s = result.get("images_per_s", last.get("images_per_s"))
    epochs = result.get("epochs", last.get("epoch"))
    found: list[tuple[str, str] | None] = [
        None if images_per_s is None else (f"{images_per_s:,.0f}", "images per second"),
        None if epochs is None else (f"{epochs:.2f}", "epochs"),
        None if "step" not in last else (f"{last['step']:,}", "steps"),
        None if "train_s" not in result else (timeline.seconds(result["train_s"]), "of training"),
        None if "loss" not in last else (f"{last['loss']:.3f}", "last loss, of 8"),
        None if "peak_gib" not in last else (f"{last['peak_gib']:.2f} GiB", "memory at most"),
        None if "mfu" not in last else (f"{100 * last['mfu']:.1f} %", "of the GPU's peak"),
    ]
    if "elapsed_s" in result and plan.get("budget_s"):
        left_s = plan["budget_s"] - result["elapsed_s"]
        found.append((timeline.seconds(abs(left_s)), "before the deadline" if left_s >= 0 else "after the deadline"))
    return [card for card in found if card is not None]


def _budget(
    rows: Sequence[dict[str, Any]], result: dict[str, Any] | None, plan: dict[str, Any] | None
) -> tuple[str, str]:
    fact = timeline.happened(rows, result, plan)
    if fact is None:
        return "", ""
    given = plan or {}
    told = {
        "epochs that fit": ("epochs_that_fit", "{:.3g}"),
        "base learning rate": ("base_lr", "{:.3g}"),
        "τ at the start": ("tau_base", "{:.4g}"),
        "a step": ("step_s", "{:.3g} s"),
        "a checkpoint": ("checkpoint_s", "{:.2g} s"),
        "the export": ("export_s", "{:.2g} s"),
        "the evaluation": ("evaluate_s", "{:.2g} s"),
    }
    known = [(name, form.format(given[key])) for name, (key, form) in told.items() if given.get(key) is not None]
    planned = timeline.planned(plan)
    bars = timeline.as_html(planned, fact, budget_s=given.get("budget_s"))
    said = (
        "The plan, made before the first step, against what happened."
        if planned
        else "Where the time went, from the start of the process."
    )
    if not known:
        return said, bars
    lines = "".join(f"<tr><td>{name}<td>{value}" for name, value in known)
    estimates = f"<div><table class=phases><tr><th>measured before training<th>plan{lines}</table></div>"
    return said, f"<div class=split><div>{bars}</div>{estimates}</div>"


def _curves(config: Config, rows: Sequence[dict[str, Any]]) -> str:
    return curves.figures(rows, healthy_std=config.recipe.head.out**-0.5)


def _events(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """List what the watchdogs saw: skipped steps, replaced samples, warnings; with the time of the row that told it."""
    if not rows:
        return "", ""
    told: list[tuple[float, str]] = []
    for name, (thing, why) in COUNTERS.items():
        counts = [int(row.get(name) or 0) for row in rows]
        if counts[-1]:
            first = next(row for row, count in zip(rows, counts, strict=True) if count)
            things = thing if counts[-1] == 1 else f"{thing}s"
            told.append(
                (first.get("elapsed_s", 0.0), f"{counts[-1]:,} {things} {why}, the first by step {first['step']:,}")
            )
    for row in rows:
        told += [(row.get("elapsed_s", 0.0), str(text)) for text in row.get("warnings", ())]
    if not told:
        return "", "<p class=note>No step was skipped, no image was replaced, nothing was warned of.</p>"
    lines = [f"<li><span>{timeline.seconds(at_s)}</span>{html.escape(text)}" for at_s, text in sorted(told)]
    return "", f"<ul class=events>{''.join(lines)}</ul>"


def _settings(config: Config) -> str:
    recipe, optim = config.recipe, config.recipe.optim
    settings = {
        "validation": config.val or "none",
        "encoder": f"{recipe.encoder.arch}, width {recipe.encoder.width:g}, {recipe.encoder.stem} stem",
        "heads": f"hidden {recipe.head.hidden}, out {recipe.head.out}",
        "peak learning rate": f"{recipe.peak_lr:g} (base {optim.base_lr:g} per 256 images)",
        "warm-up": f"{optim.warmup_epochs:g} epochs",
        "weight decay": f"{optim.weight_decay:g}",
        "τ at the start": f"{optim.tau_base:g}",
        "optimiser": config.optimizer,
        "engine": config.engine,
        "loader": f"{config.loader}, {config.workers} workers",
        "first view": _view(recipe.views[0]),
        "second view": _view(recipe.views[1]),
    }
    lines = "".join(f"<tr><td>{name}<td>{html.escape(value)}" for name, value in settings.items())
    return f"<table class=settings>{lines}</table>"


def _view(view: ViewConfig) -> str:
    low, high = view.area
    return (
        f"area {low:g} to {high:g}, flip {view.flip:g}, jitter {view.jitter:g} (brightness {view.brightness:g}, "
        f"contrast {view.contrast:g}, saturation {view.saturation:g}, hue {view.hue:g}), grey {view.grayscale:g}, "
        f"blur {view.blur:g}, solarise {view.solarize:g}"
    )
