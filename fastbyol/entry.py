"""Know how the commands start: signals and threads first, then the imports, which take seconds."""

from __future__ import annotations

import importlib
import os
import signal
import sys

INTERRUPTED = 75


def train() -> int:
    """Run fastbyol-train."""
    return _start("train")


def evaluate() -> int:
    """Run fastbyol-eval."""
    return _start("eval")


def _start(module: str) -> int:
    """Import a command and run it; a signal before it can answer itself ends it with status 75 and one line."""
    # torch's threads spin while they wait for one another unless told before they start; beside another process on
    # the same cores that made a step 2 to 5 times slower (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)
        status: int = importlib.import_module(f"fastbyol.{module}").main()
    except KeyboardInterrupt:
        print(f"fastbyol-{module}: interrupted before it began; give the same command again", file=sys.stderr)
        status = INTERRUPTED
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # all is done and said; the status stands
    return status
