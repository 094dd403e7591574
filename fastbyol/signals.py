"""Know how a run hears that it must stop: SIGINT, SIGTERM or SIGUSR1, remembered until the loop looks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns by SIGUSR1 where asked to


class StopSignal:
    """Remember a stopping signal until the loop looks; the second one interrupts at once."""

    def __init__(self) -> None:
        self.arrived = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.arrived:
            raise KeyboardInterrupt
        self.arrived = True

    @contextmanager
    def caught(self) -> Iterator[None]:
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
