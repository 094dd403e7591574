"""Timelines of a budget, planned and actual, as two bars of phases and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastbyol.budget import format_duration

COLOURS = {
    "start-up": "d",
    "rehearsal": "b",
    "calibration": "f",
    "training": "a",
    "scores": "c",
    "closing": "e",
    "unused": "none",
}
PHASES = tuple(COLOURS)[:-1]


@dataclass(frozen=True)
class Timeline:
    """The seconds of each known phase of PHASES, and those of the budget that were left unused."""

    seconds: dict[str, float]
    unused_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The seconds of all phases and of the unused rest."""
        return sum(self.seconds.values()) + self.unused_s


def plan_timeline(plan: dict[str, Any] | None) -> Timeline | None:
    """Build the timeline of a plan; None if it has no budget or no reserve.

    The plan has seconds in budget_s, startup_s, rehearsal_s, calibration_s and reserve_s; training gets the rest.
    """
    if not plan or plan.get("budget_s") is None or plan.get("reserve_s") is None:
        return None
    before = _before(plan)
    training_s = max(plan["budget_s"] - sum(before.values()) - plan["reserve_s"], 0.0)
    return Timeline({**before, "training": training_s, "closing": plan["reserve_s"]})


def actual_timeline(
    rows: Sequence[dict[str, Any]], result: dict[str, Any] | None, plan: dict[str, Any] | None
) -> Timeline | None:
    """Build the timeline of a run from its rows, its result and the plan's measurements; None without rows.

    Start-up is everything before training that is neither rehearsal nor calibration, including the time of earlier
    processes of the same run folder.
    """
    result, plan = result or {}, plan or {}
    ends_s = [row["elapsed_s"] for row in rows[-1:] if "elapsed_s" in row]
    if not ends_s:
        return None
    end_s = ends_s[0]
    measured = {name: s for name, s in _before(plan).items() if name != "start-up"}
    first = rows[0]
    scored_s = sum(row.get("score_s", 0.0) for row in rows)  # during training
    before_s = (
        end_s - result["train_s"] - scored_s
        if "train_s" in result
        else first["elapsed_s"] - first.get("interval_s", 0.0)
    )
    startup_s = max(before_s - sum(measured.values()), 0.0)
    training_s = max(end_s - startup_s - scored_s - sum(measured.values()), 0.0)
    seconds = {"start-up": startup_s, **measured, "training": training_s, **({"scores": scored_s} if scored_s else {})}
    elapsed_s = result.get("elapsed_s")
    if elapsed_s is None:
        return Timeline(seconds)
    seconds["closing"] = max(elapsed_s - end_s, 0.0)
    return Timeline(seconds, unused_s=max((plan.get("budget_s") or elapsed_s) - elapsed_s, 0.0))


def _before(plan: dict[str, Any]) -> dict[str, float]:
    keys = {"start-up": "startup_s", "rehearsal": "rehearsal_s", "calibration": "calibration_s"}
    return {phase: plan[name] for phase, name in keys.items() if plan.get(name) is not None}


def as_html(plan: Timeline | None, actual: Timeline, *, budget_s: float | None) -> str:
    """Return HTML with both bars on one scale and a table of the seconds."""
    scale_s = max(actual.total_s, plan.total_s if plan else 0.0, budget_s or 0.0, 1e-9)
    bars = [_bar("Planned", plan, scale_s)] if plan else []
    bars.append(_bar("Actual", actual, scale_s))
    head = f"<tr><th>phase{'<th>planned' if plan else ''}<th>actual"
    shown = [phase for phase in PHASES if phase in actual.seconds or (plan and phase in plan.seconds)]
    lines = [_line(phase, plan, actual) for phase in shown]
    if actual.unused_s:
        lines.append(f"<tr><td><i class=none></i>unused{'<td>-' if plan else ''}<td>{seconds(actual.unused_s)}")
    total = f"<tr class=sum><td>total{f'<td>{seconds(plan.total_s)}' if plan else ''}<td>{seconds(actual.total_s)}"
    return f"<div class=timeline>{''.join(bars)}</div><table class=phases>{head}{''.join(lines)}{total}</table>"


def _bar(name: str, line: Timeline, scale_s: float) -> str:
    parts = [*((phase, line.seconds[phase]) for phase in PHASES if phase in line.seconds), ("unused", line.unused_s)]
    drawn = "".join(
        f'<span class={COLOURS[phase]} style="width:{100 * s / scale_s:.3f}%"></span>' for phase, s in parts if s
    )
    description = ", ".join(f"{phase} {seconds(s)}" for phase, s in parts if s)
    return f'<b>{name}</b><div class=bar role=img aria-label="{name}: {description}">{drawn}</div>'


def _line(phase: str, plan: Timeline | None, actual: Timeline) -> str:
    cells = [f"<td><i class={COLOURS[phase]}></i>{phase}"]
    for line in (plan, actual):
        if line is not None:
            cells.append(f"<td>{seconds(line.seconds[phase]) if phase in line.seconds else '-'}")
    return f"<tr>{''.join(cells)}"


def seconds(value: float) -> str:
    """Format a time to a tenth of a second below two minutes, else in its two largest units."""
    return f"{value:.1f} s" if value < 120 else format_duration(value)
