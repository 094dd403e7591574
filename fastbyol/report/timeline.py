"""Timelines of a budget, planned and actual: the seconds of each phase."""

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

    @property
    def parts(self) -> list[tuple[str, float]]:
        """The phases that took any time, in order, with their seconds; the unused rest last."""
        every = [*((phase, self.seconds.get(phase, 0.0)) for phase in PHASES), ("unused", self.unused_s)]
        return [(phase, phase_s) for phase, phase_s in every if phase_s]

    @property
    def description(self) -> str:
        """The parts as text, for a reader who does not see the bar."""
        return ", ".join(f"{phase} {seconds(phase_s)}" for phase, phase_s in self.parts)


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


def seconds(value: float) -> str:
    """Format a time to a tenth of a second below two minutes, else in its two largest units."""
    return f"{value:.1f} s" if value < 120 else format_duration(value)
