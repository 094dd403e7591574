"""The number of threads that torch divides an operation among, chosen by measuring the pace, and changed with it.

The threads of an operation wait for one another at its end. Where another program holds one of their cores, all wait
until it is taken off: with two threads beside one busy process a step takes 20 to 70 times as long as with one.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fastbyol.cgroups import available_cores
from fastbyol.starvation import usage

UNITS, UNITS_S, UNITS_MAX_S = 3, 0.05, 1.0  # a number is tried for so many units and seconds; no longer than the last
BAD = 3.0  # times the best that ends a trial early
SLOW = 1.5  # times the pace as chosen: what was chosen is put to the test again
WINDOW, WINDOW_S = 4, 0.5  # units and seconds that tell the pace
BETTER = 0.95  # of what is in use, or less, makes a change worth while
TRIALS_SHARE = 0.02  # of the time may be lost in trials made without a cause
SLOW_SHARE = 0.1  # in those made because work became slow
EVERY_S = 5.0  # from trial to trial at least
ROOM, ROOM_EVERY_S = 0.6, 1.0  # cores that must be idle for another thread; how often they are counted
Notify = Callable[[str], None]
Item = TypeVar("Item")


def candidates(limit: int) -> tuple[int, ...]:
    """List the numbers that are tried: powers of two, all cores, and one core left to others."""
    powers = (2**n for n in range(limit.bit_length()))
    return tuple(sorted({*powers, max(limit - 1, 1), limit}))


def read_other_cpu_s() -> float:
    """Read the CPU time that all other processes of the machine have used, in seconds."""
    now = usage()
    return now.machine_cpu_s - now.cpu_s


@dataclass
class _Work:
    """Follow one kind of work: the number of threads in use, what is still to be tried, and what trials showed."""

    number: int
    to_try: list[int]
    is_cold: bool = True
    units: list[float] = field(default_factory=list)  # seconds, of the number under trial
    tried: dict[int, float] = field(default_factory=dict)  # mean seconds of a unit
    spent_s: float = 0.0  # in this trial
    count: int = 0
    pace_s: float = 0.0  # of a unit, when last chosen
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    next_s: float = 0.0
    slow_from_s: float = 0.0
    room: float = 0.0


class ThreadTuner:
    """Let loops of like units of work run with the number of threads that is fastest now.

    numbers: what may be chosen, rising; with fewer than two, nothing is measured or changed. say: take the one line
    that tells the user when fewer than all are first chosen. clock, use, others: seconds, what sets the number, and
    what tells the CPU seconds of other processes.
    """

    def __init__(
        self,
        numbers: Sequence[int] = (),
        *,
        notify: Notify = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        other_cpu_s: Callable[[], float] = read_other_cpu_s,
    ) -> None:
        self.numbers, self.notify = tuple(numbers), notify
        self.lost_s = 0.0  # in trials, against the number they chose
        self._clock, self._set_threads, self._other_cpu_s = clock, set_threads, other_cpu_s
        self._works: dict[Hashable, _Work] = {}
        self._has_notified = False
        self._last: _Work | None = None
        self._room, self._counted = 0.0, (clock(), other_cpu_s() if len(self.numbers) > 1 else 0.0)

    @contextmanager
    def unit(self, work: Hashable) -> Iterator[None]:
        """Run the with-block as one unit of a kind of work; units of a kind take about as long as one another."""
        began_s = self._begin(work)
        yield
        self._end(work, began_s)

    def units(self, items: Iterable[Item], work: Hashable) -> Generator[Item, None, None]:
        """Yield the items; a unit is what happens from one to the next, getting it included.

        It begins with the number chosen last for other work, and tries others when that is due.
        """
        left = iter(items)
        while True:
            began_s = self._begin(work, inherits=True)
            try:
                item = next(left)
            except StopIteration:
                return
            yield item
            self._end(work, began_s)

    def is_settled(self, work: Hashable) -> bool:
        """Tell whether no trial of that work is under way or has still to come first."""
        return len(self.numbers) < 2 or (work in self._works and not self._works[work].to_try)

    def settle(self) -> None:
        """End every trial now, with the best that was found."""
        for work in self._works.values():
            if work.to_try:
                work.to_try, work.units = [], []
                self._choose(work)

    def _begin(self, work: Hashable, *, inherits: bool = False) -> float:
        if len(self.numbers) > 1:
            if work not in self._works:
                last = self._last if inherits else None
                number, to_try = (self.numbers[-1], list(self.numbers)) if last is None else (last.number, [])
                next_s = 0.0 if last is None else max(last.next_s, self._clock() + EVERY_S)
                self._works[work] = _Work(number, to_try, next_s=next_s, room=self._room)
            own = self._works[work]
            self._set_threads(own.to_try[0] if own.to_try else own.number)
        return self._clock()

    def _end(self, name: Hashable, began_s: float) -> None:
        if len(self.numbers) < 2:
            return
        work, now_s = self._works[name], self._clock()
        if not work.pace_s and len(work.recent) >= WINDOW:
            work.pace_s = sum(work.recent) / len(work.recent)
        took_s = now_s - began_s
        if work.is_cold:  # memory is taken, algorithms are chosen
            work.is_cold = False
            self._count_room(now_s, every_s=0.1)
            self._leave_out(work)
        elif work.to_try:
            self._try(work, took_s)
        else:
            work.recent.append(took_s)
            self._count_room(now_s)
            if self._is_due(work, now_s):
                work.to_try, work.tried, work.units, work.spent_s, work.count = list(self.numbers), {}, [], 0.0, 0

    def _leave_out(self, work: _Work) -> None:
        """Put off trying more threads than there are idle cores: a unit could take 70 times as long."""
        fitting = [number for number in work.to_try if number <= max(self._room + 1 - ROOM, 1)]
        if self._room and len(fitting) < len(work.to_try):
            work.to_try = fitting
            if not self._has_notified:
                self._has_notified = True
                self.notify(
                    f"other programs leave {self._room:.1f} cores: at most {fitting[-1]} of {self.numbers[-1]} threads "
                    "compute for now; the number follows the pace, and --threads fixes it"
                )

    def _try(self, work: _Work, took_s: float) -> None:
        """Take in a unit of the number under trial; go on to the next number, or choose, when it is known well."""
        work.units.append(took_s)
        work.spent_s += took_s
        work.count += 1
        sum_s, count = sum(work.units), len(work.units)
        is_known = sum_s >= UNITS_MAX_S or (count >= UNITS and sum_s >= UNITS_S)
        is_bad = bool(work.tried) and sum_s > 2 * UNITS_S and sum_s / count > BAD * min(work.tried.values())
        if is_known or is_bad:
            work.tried[work.to_try.pop(0)] = sum_s / count
            work.units = []
            if not work.to_try:
                self._choose(work)

    def _choose(self, work: _Work) -> None:
        """End a trial."""
        now_s, before = self._clock(), work.number
        if not work.tried:
            return
        best = min(work.tried, key=work.tried.__getitem__)
        if before not in work.tried or work.tried[best] < BETTER * work.tried[before]:
            work.number = best
        work.pace_s = work.tried[work.number]
        lost_s = max(work.spent_s - work.count * work.pace_s, 0.0)
        self.lost_s += lost_s
        work.next_s = now_s + max(EVERY_S, lost_s / TRIALS_SHARE)
        work.slow_from_s = now_s + lost_s / SLOW_SHARE
        work.room = self._room
        work.recent.clear()
        self._last = work
        self._set_threads(work.number)
        most = self.numbers[-1]
        if work.number < most and most in work.tried and not self._has_notified:
            self._has_notified = True
            self.notify(
                f"{work.number} of {most} threads compute: a step, or batch, takes {1000 * work.pace_s:.3g} ms with "
                f"{work.number} and {1000 * work.tried[most]:.3g} ms with {most}, as beside other programs; the number "
                "follows the pace, and --threads fixes it"
            )

    def _is_due(self, work: _Work, now_s: float) -> bool:
        """Tell whether to try all numbers again: by time, since work became slow, or since cores became idle."""
        if now_s >= work.next_s:
            return True
        if work.number > self.numbers[0] and now_s >= work.slow_from_s:
            units = list(work.recent)[-WINDOW:]
            if sum(units) < WINDOW_S:
                units = list(work.recent)
            is_known = len(units) >= 2 and (sum(units) >= UNITS_MAX_S or len(units) >= WINDOW)
            if is_known and sum(units) / len(units) > SLOW * work.pace_s > 0:
                return True
        wanted = work.number + ROOM
        return work.number < self.numbers[-1] and work.room < wanted <= self._room and now_s >= work.slow_from_s

    def _count_room(self, now_s: float, *, every_s: float = ROOM_EVERY_S) -> None:
        """Count now and then the cores that other processes leave."""
        before_s, used_s = self._counted
        if now_s - before_s >= every_s:
            others = self._other_cpu_s()
            self._room = (os.cpu_count() or 1) - (others - used_s) / (now_s - before_s)
            self._counted = now_s, others


NO_TUNING = ThreadTuner()


def make_tuner(asked: int | None, device: str, *, processes: int = 1, notify: Notify = lambda _: None) -> ThreadTuner:
    """Say how the number of threads is found: as asked, as OMP_NUM_THREADS says, or by measuring, on a CPU alone.

    processes: how many of one run share the cores; where there are more, each has its share.
    """
    if asked is not None:
        torch.set_num_threads(asked)
        return ThreadTuner((asked,), notify=notify)
    if "OMP_NUM_THREADS" in os.environ:
        return ThreadTuner((torch.get_num_threads(),), notify=notify)
    limit = max(available_cores() // processes, 1)
    torch.set_num_threads(limit)
    return ThreadTuner(candidates(limit) if device == "cpu" and processes == 1 else (limit,), notify=notify)
