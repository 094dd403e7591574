"""Know how a run hears that it must stop: SIGINT, SIGTERM, SIGUSR1, or SIGHUP when its terminal goes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # Slurm warns by SIGUSR1 where asked to


def active_stop_signals() -> list[signal.Signals]:
    """List the signals that stop a run: those of STOP_SIGNALS, but for SIGHUP where nohup has it ignored."""
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


STALLED_S = 4.0  # after which who waits for something is not expected to look for the signal soon


class StopSignal:
    """Remember a stopping signal: it interrupts at once, or where deferred waits to be looked for.

    It is remembered either way, because Python drops an exception that a signal raises inside a destructor or a
    callback of the garbage collector: then the loop still stops.
    """

    def __init__(self) -> None:
        self.has_arrived = False
        self._is_deferred = False
        self._when_stalled: Callable[[], None] | None = None

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        is_first, self.has_arrived = not self.has_arrived, True
        if not (is_first and self._is_deferred):
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, STALLED_S)

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        if self._when_stalled is not None:
            self._when_stalled()

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Catch the signals inside the with-block; restore what was there after it. Only a main thread hears any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in active_stop_signals()}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._ring)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def on_stall(self, when_stalled: Callable[[], None]) -> Iterator[None]:
        """Call `when_stalled` in the midst of the with-block, if it still waits STALLED_S after a first signal."""
        self._when_stalled = when_stalled
        if self.has_arrived:
            signal.setitimer(signal.ITIMER_REAL, STALLED_S)
        try:
            yield
        finally:
            self._when_stalled = None

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Let the first signal inside the with-block be only remembered; the second interrupts."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
