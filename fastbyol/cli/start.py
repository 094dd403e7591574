"""Entry points of the commands that import torch: signal handlers first, then the imports, which take seconds."""

from __future__ import annotations

import importlib
import os
import signal
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from fastbyol.system.signals import STOP_SIGNALS, active_stop_signals

INTERRUPTED = 75


def train() -> NoReturn:
    """Run fastbyol-train."""
    _start("train")


def evaluate() -> NoReturn:
    """Run fastbyol-eval."""
    _start("eval")


def embed() -> NoReturn:
    """Run fastbyol-embed."""
    _start("embed")


def _start(module: str) -> NoReturn:
    """Import a command and run it; a signal during the import prints one line and ends the process with status 75."""
    command = f"fastbyol-{module}"

    def quit_at_once(_number: int, _frame: FrameType | None) -> None:
        # nothing has started; an exception could be lost in a callback of the import system
        with suppress(OSError):  # nobody may read it
            os.write(2, f"{command}: interrupted; give the same command again\n".encode())
        os._exit(INTERRUPTED)

    def work() -> int:
        status: int = importlib.import_module(f"fastbyol.cli.{module}").main()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the work is done: a late signal must not change the status
        return status

    for number in active_stop_signals():
        signal.signal(number, quit_at_once)
    from fastbyol.system.output import run_command  # noqa: PLC0415 - after the handlers

    status = run_command(command, work)
    os._exit(status)  # every file is closed, every line printed; unloading torch would cost a second of the budget
