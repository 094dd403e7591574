"""Progress by steps or by the clock, and the time reserved at the end for the closing work."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

EXIT_S = 0.5  # reserved for the exit of the process when nothing competes with it; it takes about 0.05
LEAVE_S = 0.2  # the part of EXIT_S for which a score is given up
MARGIN = 1.15  # times the closing work as measured, whose time varies
SLOWDOWN_MAX = 6.0  # the closing work gets at most this many times its fastest time
IDLE_SHARE = 0.04  # of the budget at most is reserved for a slowdown that may end: 93 % must be used
SCORE_SLOWDOWN_MAX = 2.5  # after a score, report and result get at most this many times their fastest time
RECENT = 16  # steps whose median is the current time of a step


class Plan(Protocol):
    """Progress from 0 to 1, and the end of a run: by steps or by the clock."""

    @property
    def end_s(self) -> float:
        """The latest end of training, in seconds of the run."""
        ...

    @property
    def score_until_s(self) -> float:
        """The time at which an unfinished score is given up, in seconds of the run."""
        ...

    def advance(self, progress: float, *, step: int, since_s: float, now_s: float) -> float:
        """Return the progress after `step` steps at `now_s`, given the progress at `since_s`."""
        ...

    def is_over(self, step: int, *, now_s: float) -> bool:
        """Tell whether training ends after this many steps."""
        ...

    def record_step(self, crop_px: int, seconds: float) -> None:
        """Record the time of one step."""
        ...

    def record_piece(self, piece: str, seconds: float) -> None:
        """Record the time of a piece of closing work."""
        ...


@dataclass(frozen=True)
class StepPlan:
    """Progress by steps: step / total_steps, however long that takes."""

    total_steps: int
    end_s: float = math.inf
    score_until_s: float = math.inf

    def advance(self, progress: float, *, step: int, since_s: float, now_s: float) -> float:  # noqa: ARG002
        """Return the progress after `step` steps; the clock does not matter."""
        return min(step / self.total_steps, 1.0)

    def is_over(self, step: int, *, now_s: float) -> bool:  # noqa: ARG002
        """Tell whether all steps are done."""
        return step >= self.total_steps

    def record_step(self, crop_px: int, seconds: float) -> None:
        """Leave out the time of a step, which changes nothing."""

    def record_piece(self, piece: str, seconds: float) -> None:
        """Leave out the time of closing work, which changes nothing."""


@dataclass
class Reserve:
    """The estimated seconds from the last step to the end of the process, from measurements so far.

    `closing_s`: seconds of each piece of closing work in the rehearsal. They are scaled by how much slower steps are
    now than they were then: a process that competes with the steps for cores competes with the closing work, too. Steps
    are compared with steps of the same crop size.
    """

    closing_s: dict[str, float]
    rehearsed_step: tuple[int, float] | None = None  # crop side in pixels, seconds
    fastest_s: dict[int, float] = field(default_factory=dict)  # crop side in pixels -> seconds of the fastest steps
    recent_steps: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def record_step(self, crop_px: int, seconds: float) -> None:
        """Record the time of one step."""
        self.recent_steps.append((crop_px, seconds))
        if len(self.recent_steps) == RECENT and all(px == crop_px for px, _ in self.recent_steps):
            # a median, since the host's time for a single step on a GPU may be that of its launch alone
            self.fastest_s[crop_px] = min(self.step_s(), self.fastest_s.get(crop_px, math.inf))

    def step_s(self) -> float:
        """Return the current seconds of a step, the median of the last few; 0 before the first."""
        return median(seconds for _, seconds in self.recent_steps) if self.recent_steps else 0.0

    def record_piece(self, piece: str, seconds: float) -> None:
        """Record the time of a piece of closing work during training, if it is longer than in the rehearsal."""
        self.closing_s[piece] = max(self.closing_s.get(piece, 0.0), seconds / self.slowdown())

    def slowdown(self) -> float:
        """Return how many times as long as in the rehearsal the closing work would take now."""
        if self.rehearsed_step is None or not self.recent_steps:
            return 1.0
        now = median(self._slowdown_of(px, seconds) for px, seconds in self.recent_steps)
        return now / self._slowdown_of(*self.rehearsed_step)

    def _slowdown_of(self, crop_px: int, seconds: float) -> float:
        return min(max(seconds / self.fastest_s.get(crop_px, seconds), 1.0), SLOWDOWN_MAX)

    def seconds(self, *, slowdown_max_s: float = math.inf) -> float:
        """Return the seconds to reserve: at most `slowdown_max_s` more than the closing work takes at its fastest."""
        slowdown, work_s = self.slowdown(), MARGIN * sum(self.closing_s.values())
        now_s = EXIT_S * max(slowdown, 1.0) + slowdown * work_s
        fastest_s = EXIT_S + work_s * min(self._least_slowdown(), slowdown)
        return min(now_s, fastest_s + slowdown_max_s)

    def _least_slowdown(self) -> float:
        """Return the slowdown of undisturbed closing work: 1, or less if the rehearsal itself was slowed down."""
        return 1.0 if self.rehearsed_step is None else 1.0 / self._slowdown_of(*self.rehearsed_step)


@dataclass
class ClockPlan:
    """Progress by the clock: the remaining progress is spread evenly over the remaining time.

    `deadline_s`: the end of the process in seconds of the run; training ends earlier by the reserve. However the speed
    or the reserve changes, progress never falls and is 1 when training ends; undisturbed it is linear in time.
    `in_flight`: steps by which the host is ahead of the GPU.
    """

    deadline_s: float
    reserve: Reserve
    in_flight: int = 0

    @property
    def end_s(self) -> float:
        """The latest end of training, in seconds of the run."""
        return self.deadline_s - self.reserve.seconds(slowdown_max_s=IDLE_SHARE * max(self.deadline_s, 0.0))

    @property
    def score_until_s(self) -> float:
        """The time at which an unfinished score is given up, in seconds of the run."""
        after_s = sum(self.reserve.closing_s.get(piece, 0.0) for piece in ("report", "result"))
        return self.deadline_s - min(self.reserve.slowdown(), SCORE_SLOWDOWN_MAX) * (LEAVE_S + after_s)

    def advance(self, progress: float, *, step: int, since_s: float, now_s: float) -> float:  # noqa: ARG002
        """Return the progress at `now_s`, given the progress at `since_s`."""
        end_s = self.end_s
        if now_s >= end_s:
            return 1.0
        return progress + (1 - progress) * (now_s - since_s) / (end_s - since_s)

    def is_over(self, step: int, *, now_s: float) -> bool:  # noqa: ARG002
        """Tell whether another step of the current length would end after `end_s`."""
        return now_s + (1 + self.in_flight) * self.reserve.step_s() > self.end_s

    def record_step(self, crop_px: int, seconds: float) -> None:
        """Record the time of one step in the reserve."""
        self.reserve.record_step(crop_px, seconds)

    def record_piece(self, piece: str, seconds: float) -> None:
        """Record the time of a piece of closing work in the reserve."""
        self.reserve.record_piece(piece, seconds)
