"""Small SVG charts with lines, areas and ticks; colours come from the page's style, so that dark mode works.

They are not drawn by matplotlib, because its import alone takes 0.6 s of CPU time at the end of every run.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 200  # user units; a chart is shown at about this many CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 24  # margins around the plot
TIME_UNITS = (("s", 1), ("min", 60), ("h", 3600), ("d", 86_400))

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One curve: its values at the chart's x, a colour class of the page's style, and a fine or bold stroke."""

    values: Values
    colour: str = "a"
    is_fine: bool = False


@dataclass(frozen=True)
class Axes:
    """The ranges of x, in seconds, and y, and their mapping to the plot."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the point (x, y) in user units."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Choose about `about` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Format a number in about four characters: 0.97, 12.5, 884, 12.5k, 3e-06."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def time_unit(seconds: float) -> tuple[str, float]:
    """Choose the largest unit of which a span holds at least 2.5: its name and its length in seconds."""
    return next((unit for unit in reversed(TIME_UNITS) if seconds >= 2.5 * unit[1]), TIME_UNITS[0])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _frame(axes: Axes, y_ticks: Sequence[float]) -> str:
    parts = []
    for value in y_ticks:
        _, y = axes.place(axes.x[0], value)
        parts.append(f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 3.5, number(value), "end"))
    name, unit = time_unit(axes.x[1])
    marks = [value * unit for value in ticks(axes.x[0] / unit, axes.x[1] / unit, about=5)]
    for value in marks:
        x, _ = axes.place(value, axes.y[0])
        label = number(value / unit) + (f" {name}" if value == marks[-1] else "")
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(_text(min(x, WIDTH - RIGHT), HEIGHT - 6, label, anchor))
    return "".join(parts)


def _paths(axes: Axes, seconds: Sequence[float], line: Line) -> str:
    """Draw one curve with gaps where values are missing; a single value is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(seconds, line.values, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append(axes.place(x, min(max(y, axes.y[0]), axes.y[1])))
    drawn = []
    for run in runs:
        if len(run) == 1:
            drawn.append(f'<circle class="dot {line.colour}" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="2.5"/>')
        elif run:
            points = "L".join(f"{x:.1f},{y:.1f}" for x, y in run)
            drawn.append(f'<path class="{"fine" if line.is_fine else "bold"} {line.colour}" d="M{points}"/>')
    return "".join(drawn)


def _svg(body: str, label: str) -> Markup:
    described = html.escape(label, quote=True)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{body}</svg>')


def _span(seconds: Sequence[float]) -> tuple[float, float]:
    """Start x at the first row, which comes late on a short budget; at 0 if there is only one row."""
    return (seconds[0] if seconds[-1] > seconds[0] else 0.0), seconds[-1]


def _bounds(lines: Sequence[Line], low: float | None, high: float | None) -> tuple[float, float]:
    known = [value for line in lines for value in line.values if value is not None]
    bottom = min(known) if low is None else low
    top = max(known) if high is None else high
    if not top > bottom:  # a single value: in the middle, or at the top of an axis that starts at low
        reach = 0.1 * abs(top) or 1.0
        bottom, top = (bottom if low is not None else bottom - reach), top + reach
    marks = ticks(bottom, top)
    step = marks[1] - marks[0] if len(marks) > 1 else 0.0
    if high is None and step and marks[-1] < top - 1e-9 * step:  # end on a tick when nothing else ends the axis
        top = marks[-1] + step
    if low is None and step and marks[0] > bottom + 1e-9 * step:
        bottom = marks[0] - step
    return bottom, top


def curves(
    label: str,
    seconds: Sequence[float],
    lines: Sequence[Line],
    *,
    low: float | None = None,
    high: float | None = None,
    level: tuple[float, str] | None = None,
) -> Markup:
    """Draw lines over time as SVG; at least one value must be present.

    label: the chart's text alternative. low, high: ends of y, None to fit the values. level: a value to draw as a
    dashed line, and its name.
    """
    axes = Axes(_span(seconds), _bounds(lines, low, high))
    body = _frame(axes, ticks(*axes.y))
    if level is not None:
        _, y = axes.place(0, level[0])
        body += f'<line class=level x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += _text(WIDTH - RIGHT, y - 5, level[1], "end")
    return _svg(body + "".join(_paths(axes, seconds, line) for line in lines), label)


def stack(label: str, seconds: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Draw fractions that add up to at most 1 as stacked areas, from below; layers: (colour, fractions over time)."""
    axes = Axes(_span(seconds), (0.0, 100.0))
    base = [0.0] * len(seconds)
    body = ""
    for colour, shares in layers:
        top = [below + 100 * share for below, share in zip(base, shares, strict=True)]
        outline = [*zip(seconds, top, strict=True), *reversed([*zip(seconds, base, strict=True)])]
        points = " ".join("{:.1f},{:.1f}".format(*axes.place(x, min(y, 100.0))) for x, y in outline)
        body += f'<polygon class="area {colour}" points="{points}"/>'
        base = top
    return _svg(body + _frame(axes, (0, 25, 50, 75, 100)), label)


def smooth(values: Values, *, reach: int) -> list[float | None]:
    """Replace each value by the mean of those up to `reach` places away; missing values stay missing."""
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    spans = [(max(at - reach, 0), min(at + reach + 1, len(values))) for at in range(len(values))]
    return [
        None if value is None else (sums[end] - sums[begin]) / (counts[end] - counts[begin])
        for value, (begin, end) in zip(values, spans, strict=True)
    ]
