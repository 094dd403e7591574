"""Know the report of a run: one self-contained page with what was asked, how it went and what came out."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fastbyol import atomic, views
from fastbyol.beton import Reader
from fastbyol.budget import format_duration
from fastbyol.config import Config
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.loaders.native import decode
from fastbyol.order import global_batch

SHOWN_IMAGES = 10
PLOTTED_ROWS = 1000  # enough for the eye; a long run has more
SERIES = (
    "elapsed_s",
    "loss",
    "lr",
    "tau",
    "embedding_std",
    "images_per_s",
    "interval_s",
    "loader_wait_s",
    "views_s",
    "step_s",
    "log_s",
)  # of a row
BLUE, ORANGE, GREEN, GRAY = "#2f6db5", "#d9822b", "#3b8f5a", "#8a8f98"

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c2430;margin:0 auto;max-width:1080px;padding:1.2rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .6rem}p{margin:.3rem 0}
.muted{color:#5a6472}.numbers{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.number{border:1px solid #dde2e8;border-radius:8px;padding:.6rem 1rem;min-width:8rem}
.number b{display:block;font-size:1.5rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:1rem}.plots svg{width:100%;height:auto}
img{width:100%;image-rendering:pixelated}table{border-collapse:collapse;width:100%}
td{border-bottom:1px solid #eceff3;padding:.2rem .6rem .2rem 0}td+td{overflow-wrap:anywhere}
"""


def write(
    path: Path, config: Config, *, train: Reader, rows: Sequence[dict[str, Any]], result: dict[str, Any] | None
) -> None:
    """Write the page from the rows of metrics.jsonl and the result, None for a run that has not finished; atomic."""
    rows = rows[:: max(len(rows) // PLOTTED_ROWS, 1)]
    parts = [
        f"<h1>fastbyol: {html.escape(config.recipe.name)}</h1>",
        f"<p class=muted>{_summary(config, len(train))}</p>",
        _numbers(result) if result else "<p>This run has not finished.</p>",
        f"<h2>Training</h2><div class=plots>{''.join(_plots(config, rows, result))}</div>" if rows else "",
        "<h2>What the networks see: image, first view, second view</h2>",
        f'<img alt="training images above their two views" src="data:image/png;base64,{_views_png(config, train)}">',
        f"<h2>Settings</h2>{_table(config)}",
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastbyol {html.escape(config.recipe.name)}</title>"
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )
    atomic.write(path, page)


def _summary(config: Config, images: int) -> str:
    encoder = config.recipe.encoder
    length = (
        f"{config.epochs:g} epochs" if config.budget_s is None else f"a budget of {format_duration(config.budget_s)}"
    )
    return (
        f"{encoder.arch}, width {encoder.width:g}, {encoder.stem} stem; {images} images of {html.escape(config.data)}; "
        f"{length}, batch {config.recipe.batch_size}, {config.recipe.crop_px} px, seed {config.seed}, {config.device}"
    )


def _numbers(result: dict[str, Any]) -> str:
    shown = [(f"{result['images_per_s']:.0f}", "images/s"), (f"{result['epochs']:.2f}", "epochs")]
    shown.append((format_duration(result["train_s"]), "of training"))
    if result["knn_top1"] is not None:
        before, after = result["knn_top1_random_init"], result["knn_top1"]
        shown = [(f"{after:.1f} %", "kNN top-1"), (f"{before:.1f} %", "kNN of the random init"), *shown]
    cards = "".join(f"<div class=number><b>{value}</b>{name}</div>" for value, name in shown)
    return f"<div class=numbers>{cards}</div>"


def _plots(config: Config, rows: Sequence[dict[str, Any]], result: dict[str, Any] | None) -> list[str]:
    minutes = [row["elapsed_s"] / 60 for row in rows]

    def series(name: str) -> list[float]:
        return [row[name] for row in rows]

    def rates(ax: Axes) -> None:
        ax.plot(minutes, series("lr"), color=BLUE)
        ax.tick_params(axis="y", labelcolor=BLUE)
        right = ax.twinx()
        right.plot(minutes, series("tau"), color=ORANGE)
        right.tick_params(axis="y", labelcolor=ORANGE)
        right.ticklabel_format(useOffset=False)

    def spread(ax: Axes) -> None:
        healthy = config.recipe.head.out**-0.5
        ax.plot(minutes, series("embedding_std"), color=BLUE)
        ax.axhline(healthy, color=GRAY, ls="--", lw=1)
        ax.set_ylim(0, 1.25 * healthy)

    def time_shares(ax: Axes) -> None:
        whole = np.array(series("interval_s"))
        shares = [100 * np.array(series(name)) / whole for name in ("step_s", "views_s", "loader_wait_s", "log_s")]
        ax.stackplot(
            minutes, *shares, labels=("step", "views", "waiting", "logging"), colors=(GREEN, BLUE, ORANGE, GRAY)
        )
        ax.set_ylim(0, 100)
        ax.legend(loc="lower left", fontsize=8)

    def from_zero(name: str, color: str) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            ax.plot(minutes, series(name), color=color)
            ax.set_ylim(bottom=0)

        return draw

    plots = [
        _svg("loss (both directions)", from_zero("loss", BLUE)),
        _svg("learning rate (blue), target rate τ (orange)", rates),
        _svg("embedding std (dashed: 1/√D, healthy)", spread),
        _svg("images/s", from_zero("images_per_s", GREEN)),
        _svg("share of the loop, %", time_shares),
    ]
    if result and result["knn_top1"] is not None:
        scores = [result["knn_top1_random_init"], result["knn_top1"]]

        def bars(ax: Axes) -> None:
            ax.bar_label(ax.bar(["random init", "trained"], scores, color=[GRAY, GREEN]), fmt="%.1f")
            ax.set_ylim(0, 100)

        plots.append(_svg("kNN top-1, %", bars, xlabel=""))
    return plots


def _svg(title: str, draw: Callable[[Axes], None], *, xlabel: str = "minutes") -> str:
    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    ax = figure.subplots()
    draw(ax)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.grid(alpha=0.25)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _views_png(config: Config, train: Reader) -> str:
    """Draw images of the first batch in three rows, as base64 PNG: whole, first view, second view."""
    rows = global_batch(0, batch_size=min(SHOWN_IMAGES, len(train)), count=len(train), seed=config.seed)
    batch = decode(train, rows)
    place = (batch.pixels, batch.offsets, batch.sizes)
    drawn = views.draw(
        config.recipe.views, seed=config.seed, epochs=rows.epochs, indices=rows.indices, sizes=batch.sizes.numpy()
    )
    px = config.recipe.crop_px
    whole = views.center_view(*place, crop_px=px, margin=1.0)
    images = torch.cat([whole, views.apply(*place, drawn, crop_px=px)])
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    grid = pixels.view(3, -1, 3, px, px).permute(0, 3, 1, 4, 2).reshape(3 * px, -1, 3)
    buffer = io.BytesIO()
    Image.fromarray(grid.numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _table(config: Config) -> str:
    recipe, optim = config.recipe, config.recipe.optim
    settings = {
        "validation": config.val or "none",
        "heads": f"hidden {recipe.head.hidden}, out {recipe.head.out}",
        "peak learning rate": f"{recipe.peak_lr:g} (base {optim.base_lr:g} per 256 images)",
        "warm-up": f"{100 * config.recipe.optim.warmup_epochs:.3g} % of the run",
        "weight decay": f"{optim.weight_decay:g}",
        "τ at the start": f"{optim.tau_base:g}",
        "first view": str(recipe.views[0]),
        "second view": str(recipe.views[1]),
    }
    lines = "".join(f"<tr><td>{name}<td>{html.escape(value)}" for name, value in settings.items())
    return f"<table>{lines}</table>"
