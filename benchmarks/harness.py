"""Comparisons of rivals: each is checked against the reference, then all are timed in interleaved rounds."""

from __future__ import annotations

import gc
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from types import FrameType

import torch

from benchmarks.rows import Row, place, row_of
from benchmarks.stopwatch import WARM_UPS, Stopwatch, Taken

LEAST_ROUNDS = 3


class Absent(Exception):
    """A rival is not installed on this machine."""


class ContextLost(RuntimeError):
    """A kernel broke this process's CUDA context; what follows comparison `number` needs a new process."""

    def __init__(self, number: int) -> None:
        super().__init__(f"the CUDA context was lost in comparison {number}")
        self.number = number


@dataclass(frozen=True)
class Ready:
    """A prepared implementation: `run` does the work once, `check` raises where its results are wrong."""

    run: Callable[[], object]
    check: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """An implementation to time. Cases of one name, shape and dtype compete.

    prepare: makes it ready, or raises Absent. images: of one run, where that means anything. bytes_moved: the least any
    implementation of this algorithm reads and writes in one run, so that GB/s compare. is_alone: too large to stay in
    memory beside its rivals, or too slow to prepare for them to wait.
    """

    case: str
    shape: str
    implementation: str
    prepare: Callable[[], Ready]
    images: int | None = None
    dtype: str = "float32"
    bytes_moved: int | None = None
    is_alone: bool = False

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile makes it, which takes seconds to minutes."""
        return "compile" in self.implementation

    @property
    def question(self) -> tuple[str, str, str, str]:
        """The comparison that this case belongs to."""
        return self.case, self.shape, self.dtype, self.implementation if self.is_alone else ""


@dataclass
class _Entry:
    """One case in a comparison: the case, the prepared implementation, its times, its error."""

    case: Case
    ready: Ready | None = None
    taken: list[Taken] = field(default_factory=list)
    error: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class Limits:
    """Limits of a measurement: rounds and seconds of each comparison, seconds of a preparation, and the deadline."""

    repeats: int = 20
    seconds: float = 5.0
    prepare_s: float = 120.0
    deadline: float = math.inf  # on time.monotonic's clock


def measure(
    cases: Iterable[Case], *, device: str, limits: Limits, start: int = 0, commit: str | None = None
) -> Iterator[list[Row]]:
    """Yield the rows of one comparison after the other; the first `start` are skipped.

    A case whose preparation, check or run fails becomes a row that says so, and so does one the deadline cuts off.
    Raises ContextLost, after the rows, when a failure left the GPU unusable by this process.
    """
    here, stopwatch = place(device, commit), Stopwatch(device)
    copy_gb_per_s = stopwatch.copy_gb_per_s()
    for number, (_, rivals) in enumerate(groupby(cases, key=lambda case: case.question), 1):
        entries = [_Entry(case) for case in rivals]
        if number <= start:
            continue
        is_alive = _compare(entries, stopwatch, limits)
        yield [_row(entry, copy_gb_per_s) | here for entry in entries]
        if not is_alive:
            raise ContextLost(number)
        del entries
        _free(device)


def _compare(entries: Sequence[_Entry], stopwatch: Stopwatch, limits: Limits) -> bool:
    """Fill the entries; return whether the device still works."""
    for entry in entries:
        if time.monotonic() > limits.deadline:
            entry.error = "not run: the time limit had passed"
            continue
        with _becoming_a_row(entry), _alarm(min(limits.prepare_s, limits.deadline - time.monotonic())):
            entry.ready = entry.case.prepare()
            if entry.ready.check is not None:
                entry.ready.check()
            for _ in range(WARM_UPS[stopwatch.device]):
                stopwatch(entry.ready.run)
        if entry.error and not _works(stopwatch.device):
            for other in entries:
                other.error = other.error or f"not run: {entry.case.implementation} broke the CUDA context"
            return False
    began = time.monotonic()
    for done in range(limits.repeats):
        late = time.monotonic() - began > limits.seconds or time.monotonic() > limits.deadline
        if late and done >= LEAST_ROUNDS:
            break
        for entry in entries:
            if entry.ready is not None and not entry.error:
                with _becoming_a_row(entry):
                    entry.taken.append(stopwatch(entry.ready.run))
    return _works(stopwatch.device)


@contextmanager
def _becoming_a_row(entry: _Entry) -> Iterator[None]:
    """Record whatever a rival raises as its result."""
    try:
        yield
    except Absent as error:
        entry.error = f"absent: {error}"
    except Exception as error:  # noqa: BLE001  # the other rivals are still to be timed
        first_line = (str(error).strip() or "no message").splitlines()[0]
        entry.error = f"failed: {type(error).__name__}: {first_line}"[:300]
        entry.traceback = traceback.format_exc()
        print(f"{entry.case.case}, {entry.case.implementation}:\n{entry.traceback}", file=sys.stderr, flush=True)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; compilers are Python enough to be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"preparation took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _works(device: str) -> bool:
    """Return whether the device still answers; an illegal access leaves every later call failing."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _free(device: str) -> None:
    """Free what a comparison held, compiled code too: Dynamo stops compiling after eight forms of a function."""
    if device == "cuda":  # where something is compiled
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _row(entry: _Entry, copy_gb_per_s: float | None) -> Row:
    case = entry.case
    named = {
        "case": case.case,
        "shape": case.shape,
        "dtype": case.dtype,
        "implementation": case.implementation,
    }
    if entry.error is not None:
        failed = row_of(named, error=entry.error)
        return failed if entry.traceback is None else failed | {"traceback": entry.traceback}
    return row_of(
        named,
        taken_ms=[each.taken_ms for each in entry.taken],
        host_ms=[each.host_ms for each in entry.taken],
        cpu_ms=[each.cpu_ms for each in entry.taken],
        images=case.images,
        bytes_moved=case.bytes_moved,
        copy_gb_per_s=copy_gb_per_s,
    )
