"""Signals that stop a run: SIGINT, SIGTERM, SIGUSR1, and SIGHUP when its terminal closes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # Slurm can warn by SIGUSR1


def active_stop_signals() -> list[signal.Signals]:
    """List the signals that stop a run: STOP_SIGNALS, without SIGHUP where nohup ignores it."""
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


STALL_S = 4.0  # a wait that lasts longer after a signal is taken for a stall


class StopSignal:
    """A flag that a stop signal sets. The signal also interrupts at once, unless it is deferred.

    The flag is set in both cases, because Python drops an exception that a signal raises inside a destructor or a
    garbage-collector callback: the loop then still stops.
    """

    def __init__(self) -> None:
        self.has_arrived = False
        self._is_deferred = False
        self._stall_callback: Callable[[], None] | None = None

    def _handle_stop(self, _number: int, _frame: FrameType | None) -> None:
        is_first, self.has_arrived = not self.has_arrived, True
        if not (is_first and self._is_deferred):
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, STALL_S)

    def _handle_alarm(self, _number: int, _frame: FrameType | None) -> None:
        if self._stall_callback is not None:
            self._stall_callback()

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Handle the signals inside the with-block, then restore the old handlers; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle_stop) for number in active_stop_signals()}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._handle_alarm)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def on_stall(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call `callback` inside the with-block if that still waits STALL_S after the first signal."""
        self._stall_callback = callback
        if self.has_arrived:
            signal.setitimer(signal.ITIMER_REAL, STALL_S)
        try:
            yield
        finally:
            self._stall_callback = None

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Let the first signal inside the with-block only set the flag; the second interrupts."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False


@contextlib.contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt once; later signals are ignored, so that cleanup completes."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
