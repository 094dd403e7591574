"""Know how progress follows steps or the clock, and what time to keep in reserve for the closing work."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

EXIT_S = 0.5  # kept for the end of the process, unhindered; it takes about .05
LEAVE_S = 0.2  # of it, when a score would have to be given up for it
MARGIN = 1.15  # of the closing work as measured; its time scatters
PACE_MAX = 6.0  # times its best is what the closing work is given at most
IDLE_SHARE = 0.04  # of the budget is kept at most for hindrance, which may pass: 93 % are to be used
SCORE_PACE_MAX = 2.5  # times their best are report and result given after a score
RECENT = 16  # steps whose median tells today's pace


@dataclass(frozen=True)
class StepPlan:
    """Let steps drive progress: step of `total_steps`."""

    total_steps: int

    def advance(self, progress: float, *, step: int, since_s: float, now_s: float) -> float:  # noqa: ARG002
        """Give the progress after `step` steps; the clock plays no part."""
        return min(step / self.total_steps, 1.0)

    def is_over(self, step: int, *, now_s: float) -> bool:  # noqa: ARG002
        """Tell whether every step is done."""
        return step >= self.total_steps


@dataclass
class Reserve:
    """Estimate the seconds from the last step to the end of the process, from what has been measured so far.

    `parts` are the seconds of each piece of closing work when it was rehearsed. They are scaled by how much slower
    steps are now than they were then, since whoever takes the cores from the steps takes them from the closing work,
    too. Steps are compared with steps of the same crop size.
    """

    parts: dict[str, float]
    rehearsed_step: tuple[int, float] | None = None  # crop side, seconds
    best: dict[int, float] = field(default_factory=dict)  # crop side -> seconds of a step when steps were fastest
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def note_step(self, crop_px: int, seconds: float) -> None:
        """Take note of one step."""
        self.recent.append((crop_px, seconds))
        if len(self.recent) == RECENT and all(px == crop_px for px, _ in self.recent):
            # a median, since the host's time for one step on a GPU may be that of its launch alone
            self.best[crop_px] = min(self.step_s(), self.best.get(crop_px, math.inf))

    def step_s(self) -> float:
        """Give the seconds of a step as they are now, the median of the last few; 0 before the first."""
        return median(seconds for _, seconds in self.recent) if self.recent else 0.0

    def note_piece(self, piece: str, seconds: float) -> None:
        """Take note of what a piece of the closing work took in the midst of training, if more than in rehearsal."""
        self.parts[piece] = max(self.parts.get(piece, 0.0), seconds / self.pace())

    def pace(self) -> float:
        """Give how many times as long the closing work would take now as when it was rehearsed."""
        if self.rehearsed_step is None or not self.recent:
            return 1.0
        now = median(self._hindrance(px, seconds) for px, seconds in self.recent)
        return now / self._hindrance(*self.rehearsed_step)

    def _hindrance(self, crop_px: int, seconds: float) -> float:
        return min(max(seconds / self.best.get(crop_px, seconds), 1.0), PACE_MAX)

    def seconds(self, *, hindrance_max_s: float = math.inf) -> float:
        """Give the seconds to keep; at most so many beyond what the closing work takes unhindered."""
        pace, work_s = self.pace(), MARGIN * sum(self.parts.values())
        hindered_s = EXIT_S * max(pace, 1.0) + pace * work_s
        unhindered_s = EXIT_S + work_s * min(self._best_pace(), pace)
        return min(hindered_s, unhindered_s + hindrance_max_s)

    def _best_pace(self) -> float:
        """Give the pace of the closing work when nothing hinders it: 1, or less where the rehearsal was hindered."""
        return 1.0 if self.rehearsed_step is None else 1.0 / self._hindrance(*self.rehearsed_step)


@dataclass
class ClockPlan:
    """Let the clock drive progress: what is left of it is spread evenly over what is left of the time.

    `deadline_s` is the end of the process in seconds of the run; training ends a reserve before it. Whatever happens to
    the pace or the reserve, progress never falls, and it is 1 when training ends; undisturbed, it is linear in time.
    `in_flight`: steps that the host is ahead of the GPU.
    """

    deadline_s: float
    reserve: Reserve
    in_flight: int = 0

    @property
    def end_s(self) -> float:
        """When training has to end, in seconds of the run."""
        return self.deadline_s - self.reserve.seconds(hindrance_max_s=IDLE_SHARE * max(self.deadline_s, 0.0))

    @property
    def score_until_s(self) -> float:
        """When a score that is not finished has to be given up, in seconds of the run."""
        after_s = sum(self.reserve.parts.get(piece, 0.0) for piece in ("report", "result"))
        return self.deadline_s - min(self.reserve.pace(), SCORE_PACE_MAX) * (LEAVE_S + after_s)

    def advance(self, progress: float, *, step: int, since_s: float, now_s: float) -> float:  # noqa: ARG002
        """Give the progress at `now_s` from that at `since_s`."""
        end_s = self.end_s
        if now_s >= end_s:
            return 1.0
        return progress + (1 - progress) * (now_s - since_s) / (end_s - since_s)

    def is_over(self, step: int, *, now_s: float) -> bool:  # noqa: ARG002
        """Tell whether another step, as long as they are now, would end after the end."""
        return now_s + (1 + self.in_flight) * self.reserve.step_s() > self.end_s


Plan = StepPlan | ClockPlan
