"""Tuning of torch's number of threads, by measuring the pace of the work.

The threads of an operation wait for one another at its end. Where another program uses one of their cores, all wait
until the kernel takes it off: with two threads beside one busy process a step takes 20 to 70 times as long as with one.
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

from fastbyol.system.limits import available_cores
from fastbyol.system.usage import usage

UNITS, UNITS_S, UNITS_MAX_S = 3, 0.05, 1.0  # units and seconds that a trial takes at least; seconds that end it
BAD = 3.0  # times the best pace; a trial slower than that ends early
SLOW = 1.5  # times the pace of the choice; work slower than that starts new trials
SLOW_UNIT_S = 0.25  # a unit that takes as long, and BAD times the pace, shows alone that the work became slow
WINDOW, WINDOW_S = 4, 0.5  # units and seconds over which the pace is measured
BETTER = 0.95  # of the current pace; a faster number replaces the one in use
TRIALS_SHARE = 0.02  # most of the time that periodic trials may lose
SLOW_SHARE = 0.1  # the same for trials because work became slow
EVERY_S = 5.0  # least time between trials
IDLE_CORES, IDLE_EVERY_S = 0.6, 1.0  # idle cores that one more thread needs; seconds between measurements of them
Notify = Callable[[str], None]
Item = TypeVar("Item")


def candidates(limit: int) -> tuple[int, ...]:
    """List the numbers to try: powers of two, all cores, and all cores but one."""
    powers = (2**n for n in range(limit.bit_length()))
    return tuple(sorted({*powers, max(limit - 1, 1), limit}))


def read_other_cpu_s() -> float:
    """Return the CPU seconds that all other processes of the machine have used."""
    now = usage()
    return now.machine_cpu_s - now.cpu_s


@dataclass
class _Work:
    """State of one kind of work: the number of threads in use, the numbers still to try, and the trials' results."""

    number: int
    to_try: list[int]
    is_cold: bool = True
    units: list[float] = field(default_factory=list)  # seconds, of the number on trial
    tried: dict[int, float] = field(default_factory=dict)  # number: mean seconds of a unit
    spent_s: float = 0.0  # in this trial
    count: int = 0
    pace_s: float = 0.0  # of a unit, at the last choice
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    next_s: float = 0.0
    slow_from_s: float = 0.0
    idle_cores: float = 0.0  # at the last choice


class ThreadTuner:
    """A tuner that runs loops of similar units of work with the number of threads that is fastest now.

    numbers: the candidates, ascending; with fewer than two nothing is measured or changed. notify: called once, with a
    line for the user, when fewer than all threads are first chosen. clock: seconds; set_threads: sets the number;
    other_cpu_s: the CPU seconds of other processes; cores: of the machine, all of them by default.
    """

    def __init__(
        self,
        numbers: Sequence[int] = (),
        *,
        notify: Notify = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        other_cpu_s: Callable[[], float] = read_other_cpu_s,
        cores: int | None = None,
    ) -> None:
        self.numbers, self.notify = tuple(numbers), notify
        self.lost_s = 0.0  # in trials, compared with the number they chose
        self._clock, self._set_threads, self._other_cpu_s = clock, set_threads, other_cpu_s
        self._cores = cores or os.cpu_count() or 1
        self._works: dict[Hashable, _Work] = {}
        self._has_notified = False
        self._last: _Work | None = None
        self._idle_cores = float(self._cores)  # until they are measured
        self._last_reading = (clock(), other_cpu_s() if len(self.numbers) > 1 else 0.0)

    @contextmanager
    def unit(self, work: Hashable) -> Iterator[None]:
        """Run the with-block as one unit of a kind of work, whose units all take about the same time."""
        began_s = self._begin(work)
        yield
        self._end(work, began_s)

    def units(self, items: Iterable[Item], work: Hashable) -> Generator[Item, None, None]:
        """Yield the items; a unit lasts from one item to the next, getting it included.

        The loop starts with the number last chosen for other work, and tries others when a trial is due.
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
        """Tell whether the number for that work is chosen: its first trial is over and no other runs."""
        return len(self.numbers) < 2 or (work in self._works and not self._works[work].to_try)

    def settle(self) -> None:
        """End every trial now, with the best number so far."""
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
                self._works[work] = _Work(number, to_try, next_s=next_s, idle_cores=self._idle_cores)
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
        if work.is_cold:  # the first unit also allocates memory and chooses algorithms
            work.is_cold = False
            self._measure_idle_cores(now_s, every_s=0.1)
            self._limit_to_idle_cores(work)
        elif work.to_try:
            self._try(work, took_s)
        else:
            work.recent.append(took_s)
            self._measure_idle_cores(now_s)
            is_slow = self._is_slow(work, took_s, now_s)
            if is_slow or self._is_due(work, now_s):
                work.to_try, work.tried, work.units, work.spent_s, work.count = list(self.numbers), {}, [], 0.0, 0
                if is_slow:  # another program has come
                    self._measure_idle_cores(now_s, every_s=0.1)
                self._limit_to_idle_cores(work)

    def _limit_to_idle_cores(self, work: _Work) -> None:
        """Postpone trials of more threads than idle cores: a unit could take 70 times as long."""
        fitting = [number for number in work.to_try if number <= max(self._idle_cores + 1 - IDLE_CORES, 1)]
        if len(fitting) < len(work.to_try):
            work.to_try = fitting
            if not self._has_notified:
                self._has_notified = True
                self.notify(
                    f"other programs leave {self._idle_cores:.1f} cores idle: at most {fitting[-1]} of "
                    f"{self.numbers[-1]} threads compute for now; the number follows the measured pace, and --threads "
                    "fixes it"
                )

    def _try(self, work: _Work, took_s: float) -> None:
        """Record a unit of the number on trial; once its pace is known, go on to the next number, or choose."""
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
        """End the trials and use the fastest number."""
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
        work.idle_cores = self._idle_cores
        work.recent.clear()
        self._last = work
        self._set_threads(work.number)
        most = self.numbers[-1]
        if work.number < most and most in work.tried and not self._has_notified:
            self._has_notified = True
            self.notify(
                f"{work.number} of {most} threads compute: a step, or batch, takes {1000 * work.pace_s:.3g} ms with "
                f"{work.number} and {1000 * work.tried[most]:.3g} ms with {most}, as happens beside other programs; "
                "the number follows the measured pace, and --threads fixes it"
            )

    def _is_slow(self, work: _Work, took_s: float, now_s: float) -> bool:
        """Tell whether the work became slow: one unit by far, or the last few on average."""
        if work.number == self.numbers[0] or now_s < work.slow_from_s or not work.pace_s:
            return False
        if took_s > max(BAD * work.pace_s, SLOW_UNIT_S):
            return True
        units = list(work.recent)[-WINDOW:]
        if sum(units) < WINDOW_S:
            units = list(work.recent)
        is_known = len(units) >= 2 and (sum(units) >= UNITS_MAX_S or len(units) >= WINDOW)
        return is_known and sum(units) / len(units) > SLOW * work.pace_s

    def _is_due(self, work: _Work, now_s: float) -> bool:
        """Tell whether to try all numbers again: time has passed, or cores became idle."""
        if now_s >= work.next_s:
            return True
        wanted = work.number + IDLE_CORES
        is_new_room = work.idle_cores < wanted <= self._idle_cores
        return work.number < self.numbers[-1] and is_new_room and now_s >= work.slow_from_s

    def _measure_idle_cores(self, now_s: float, *, every_s: float = IDLE_EVERY_S) -> None:
        """Measure the cores that other processes leave idle, unless the last reading is younger than every_s."""
        before_s, before_cpu_s = self._last_reading
        if now_s - before_s >= every_s:
            other_cpu_s = self._other_cpu_s()
            self._idle_cores = max(self._cores - (other_cpu_s - before_cpu_s) / (now_s - before_s), 0.0)
            self._last_reading = now_s, other_cpu_s


NO_TUNING = ThreadTuner()  # leaves torch's number of threads as it is


def make_tuner(
    requested: int | None, device: str, *, processes: int = 1, notify: Notify = lambda _: None
) -> ThreadTuner:
    """Return a tuner of the requested number of threads, else of OMP_NUM_THREADS, else one that measures on a CPU.

    processes: the number of processes of the run on this machine; several divide the cores evenly and measure nothing.
    """
    if requested is not None:
        torch.set_num_threads(requested)
        return ThreadTuner((requested,), notify=notify)
    if "OMP_NUM_THREADS" in os.environ:
        return ThreadTuner((torch.get_num_threads(),), notify=notify)
    limit = max(available_cores() // processes, 1)
    torch.set_num_threads(limit)
    return ThreadTuner(candidates(limit) if device == "cpu" and processes == 1 else (limit,), notify=notify)
