"""Position of a run, and the times of one call of its training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastbyol.monitor.metrics import Intervals
from fastbyol.schedule import Schedule
from fastbyol.train.plan import Plan

ScoreFunction = Callable[[Callable[[], bool]], dict[str, float]]  # of the current model; empty if its argument stops it


@dataclass(frozen=True)
class Position:
    """The position of a run: steps taken, progress in [0, 1], seconds spent in the loop."""

    step: int = 0
    progress: float = 0.0
    train_s: float = 0.0


@dataclass
class Session:
    """One call of Loop.run: its plan, where it began, and its times in seconds of the run.

    began_s and now_s, the end of the last step, leave out the time of scores. saved_s: the last checkpoint's begin.
    """

    plan: Plan
    schedule: Schedule
    score: ScoreFunction
    start: Position
    began_s: float
    now_s: float
    saved_s: float
    intervals: Intervals = field(default_factory=Intervals)

    def leave_out(self, seconds: float) -> None:
        """Count seconds neither as the loop's time nor as progress."""
        self.intervals.skip()
        self.began_s, self.now_s = self.began_s + seconds, self.now_s + seconds

    def left_s(self, progress: float) -> float:
        """Estimate the seconds to the end of the run at this progress."""
        done = max(progress - self.start.progress, 1e-9)
        return (self.now_s - self.began_s) * (1 - progress) / done
