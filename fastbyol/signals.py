"""Know how a run hears that it must stop: SIGINT, SIGTERM or SIGUSR1."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns by SIGUSR1 where asked to


class StopSignal:
    """Remember a stopping signal: it interrupts at once, or where deferred waits to be looked for.

    It is remembered either way, because Python drops an exception that a signal raises inside a destructor or a
    callback of the garbage collector: then the loop still stops.
    """

    def __init__(self) -> None:
        self.arrived = False
        self._is_deferred = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        is_first, self.arrived = not self.arrived, True
        if not (is_first and self._is_deferred):
            raise KeyboardInterrupt

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Catch the signals inside the with-block; restore what was there after it. Only a main thread hears any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the first signal inside the with-block be only remembered; the second interrupts."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
