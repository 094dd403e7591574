"""The charts of a run's metrics: which series are drawn, and their captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from fastbyol.report import chart

PLOTTED_ROWS = 1000  # as many as a chart can show; a long run has more
SMOOTHED_ROWS = 40  # from this number on, a bold mean is drawn over the fine rows
SMOOTH_SHARE = 0.02  # of the rows, to either side
SHOWN_SHARE = 0.005  # of the loop's time; smaller parts are not drawn
STARVING = 0.1  # share of waiting above which fastbyol warns
TIME_PARTS = {  # of monitor.metrics.LAPS, from bottom to top: colour and name
    "step_s": ("a", "step"),
    "views_s": ("b", "views"),
    "loader_wait_s": ("c", "waiting"),
    "agree_s": ("f", "ranks"),
    "checkpoint_s": ("e", "checkpoints"),
    "log_s": ("d", "log"),
}
SERIES = (
    "elapsed_s",
    "loss",
    "lr",
    "tau",
    "crop_px",
    "embedding_std",
    "images_per_s",
    "interval_s",
    "loader_wait_share",
    *TIME_PARTS,
)  # keys of a row; each may be missing

Rows = Sequence[dict[str, Any]]


def thin_rows(rows: Rows) -> Rows:
    """Take about PLOTTED_ROWS evenly spaced rows at most, always including the last."""
    stride = max(len(rows) // PLOTTED_ROWS, 1)
    return [*rows[: len(rows) - 1 : stride], rows[-1]] if rows else rows


def values(rows: Rows, name: str) -> list[float | None]:
    """Read one series; None where the value is missing or not finite."""
    found = (row.get(name) for row in rows)
    return [float(v) if isinstance(v, int | float) and math.isfinite(v) else None for v in found]


@dataclass(frozen=True)
class _Curve:
    """How one series is drawn; is_exact marks a schedule, which is not smoothed."""

    name: str
    note: str = ""
    unit: str = ""
    colour: str = "a"
    low: float | None = 0.0
    high: float | None = None
    level: tuple[float, str] | None = None
    is_exact: bool = False


MEASURES = {  # keys of the measures without labels
    "rankme": _Curve("RankMe", "directions that are used", colour="e", low=None),
    "alignment": _Curve("Alignment", "0: two crops are alike", colour="b", low=None),
    "uniformity": _Curve("Uniformity", "less: more spread out", colour="b", low=None),
}


@dataclass(frozen=True)
class Figure:
    """A chart with its caption: name, note and latest value; legend: what each colour class stands for."""

    name: str
    note: str
    latest: str
    svg: Markup
    legend: dict[str, str] = field(default_factory=dict)  # name -> colour


def figures(
    rows: Rows, result: dict[str, Any] | None, *, healthy_std: float, loss_note: str, moves_target: bool
) -> list[Figure]:
    """Draw every chart that the rows have values for; healthy_std is 1/sqrt(D). Tau is drawn where a target moves."""
    timed = [row for row in rows if isinstance(row.get("elapsed_s"), int | float)]
    if not timed:
        return []
    rows, scores = thin_rows(timed), _scores(timed, result or {})
    waiting, sizes, stds = _waiting(rows), values(rows, "crop_px"), values(rows, "embedding_std")
    probed, taus = values(rows, "probe_top1"), values(rows, "tau") if moves_target else []
    drawn = (
        _draw(_Curve("Loss", loss_note), rows, values(rows, "loss")),
        _draw(_Curve("Learning rate", is_exact=True), rows, values(rows, "lr")),
        _draw(_Curve("Target rate τ", colour="b", low=None, is_exact=True), rows, taus),
        _draw(_Curve("View size", unit=" px", colour="b", is_exact=True), rows, sizes) if len(set(sizes)) > 1 else None,
        _draw(
            _Curve(
                "Embedding std",
                "0 is collapse",
                high=1.25 * max([healthy_std, *(std for std in stds if std is not None)]),
                level=(healthy_std, "1/√D, healthy"),
            ),
            rows,
            stds,
        ),
        *scores,
        _draw(_Curve("Online probe", "top-1 on the views trained on", unit=" %", colour="e"), rows, probed),
        _draw(_Curve("Images per second", colour="e"), rows, values(rows, "images_per_s")),
        _draw(
            _Curve(
                "Waiting for images",
                "of the loop",
                unit=" %",
                colour="c",
                high=max([25.0, *(share for share in waiting if share is not None)]),
                level=(100 * STARVING, "warned above"),
            ),
            rows,
            waiting,
        ),
        _draw(_Curve("GPU utilisation", "of its peak", unit=" %", colour="e"), rows, _percent(values(rows, "mfu"))),
        _time_parts(rows),
    )
    return [figure for figure in drawn if figure is not None]


def _scores(rows: Rows, result: dict[str, Any]) -> list[Figure | None]:
    """Draw the scores taken during training between those at start and end; a score that was not taken is None."""
    first = result.get("quality_random_init") or result.get("quality_at_start") or {}
    last = result.get("quality") or {}
    knn = _Curve("kNN top-1", "validation", unit=" %", colour="e")
    at_start = result.get("knn_top1_random_init", result.get("knn_top1_at_start"))
    shown = [(knn, "knn_top1", at_start, result.get("knn_top1"))]
    shown += [(curve, name, first.get(name), last.get(name)) for name, curve in MEASURES.items()]
    return [_score(rows, *each) for each in shown]


def _score(rows: Rows, shown: _Curve, name: str, first: float | None, last: float | None) -> Figure | None:
    taken = [row for row in rows if row.get("progress", 0.0) < 1.0 and values([row], name)[0] is not None]
    if not taken:
        return None
    ends = ({"elapsed_s": rows[0]["elapsed_s"], name: first}, {"elapsed_s": rows[-1]["elapsed_s"], name: last})
    known = [row for row in (ends[0], *taken, ends[1]) if row[name] is not None]
    return _draw(shown, known, values(known, name))


def _percent(shares: list[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]


def _waiting(rows: Rows) -> list[float | None]:
    """Return the percentage of waiting in each row; rows of older runs have only the seconds."""
    shares = values(rows, "loader_wait_share")
    if any(share is not None for share in shares):
        return _percent(shares)
    pairs = zip(values(rows, "loader_wait_s"), values(rows, "interval_s"), strict=True)
    return [100 * wait_s / whole_s if wait_s is not None and whole_s else None for wait_s, whole_s in pairs]


def _draw(shown: _Curve, rows: Rows, series: list[float | None]) -> Figure | None:
    """Draw one figure; None if no row has a value."""
    known = [value for value in series if value is not None]
    if not known:
        return None
    lines = [chart.Line(series, shown.colour)]
    if len(known) >= SMOOTHED_ROWS and not shown.is_exact:
        reach = max(round(SMOOTH_SHARE * len(series)), 2)
        smoothed = chart.smooth(series, reach=reach)
        lines = [chart.Line(series, shown.colour, is_fine=True), chart.Line(smoothed, shown.colour)]
    now = chart.number(known[-1]) + shown.unit
    drawn = chart.curves(
        f"{shown.name}, from {chart.number(known[0])} to {now}",
        [float(row["elapsed_s"]) for row in rows],
        lines,
        low=shown.low,
        high=shown.high,
        level=shown.level,
    )
    return Figure(shown.name, shown.note, now, drawn)


def _time_parts(rows: Rows) -> Figure | None:
    whole = [row for row in rows if row.get("interval_s") and all(part in row for part in TIME_PARTS)]
    if len(whole) < 2:
        return None
    shown = [part for part in TIME_PARTS if any(row[part] > SHOWN_SHARE * row["interval_s"] for row in whole)]
    layers = [(TIME_PARTS[part][0], [row[part] / row["interval_s"] for row in whole]) for part in shown]
    legend = {name: colour for colour, name in (TIME_PARTS[part] for part in shown)}
    described = f"How the loop's time is shared between {', '.join(legend)}, percent"
    drawn = chart.stack(described, [float(row["elapsed_s"]) for row in whole], layers)
    return Figure("Where the loop's time goes", "%", "", drawn, legend)
