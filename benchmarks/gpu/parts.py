"""Parts of a call: commands, each a group of processes with a time limit of its own."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

FAREWELL_S = 6.0  # for a part that is stopped to print its summary or write its checkpoint
POLL_S = 0.05
SKIPPED = 77  # exit status of a part that had nothing to run with; its last line says why


@dataclass(frozen=True)
class Part:
    """A command and its time limit in seconds; the command's rows, if any, go to the file of rows it is given."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and what it printed last."""

    name: str
    status: str
    seconds: float
    last_lines: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether the part did its work, or gave a reason to skip it."""
        return self.status == "ok" or self.status.startswith("skipped")


class Running:
    """A part that was started: a process group of its own, whose lines go to `say` as they come."""

    def __init__(self, part: Part, *, root: Path, environment: Mapping[str, str], say: Callable[[str, str], None]):
        self.part, self.began, self.end_status = part, time.monotonic(), ""
        self.last_lines: list[str] = []
        self._say, self._farewell_ends = say, math.inf
        self.process = subprocess.Popen(
            part.command,
            cwd=root,
            env={**environment, **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            self.last_lines = [*self.last_lines[-4:], text] if text.strip() else self.last_lines
            self._say(self.part.name, text)

    def stop(self, why: str) -> None:
        """Interrupt the whole group, once, and remember why; after FAREWELL_S it has ended."""
        self.end_status, self._farewell_ends = why, time.monotonic() + FAREWELL_S
        self._signal(signal.SIGINT)  # pytest then prints what failed so far, a training writes a checkpoint

    @property
    def has_ended(self) -> bool:
        """Return whether the process has ended, or was stopped and took too long to end."""
        return self.process.poll() is not None or time.monotonic() >= self._farewell_ends

    def outcome(self) -> Outcome:
        """Wait for the end of the output, end what the part left running, and return the outcome."""
        seconds = time.monotonic() - self.began
        self._signal(signal.SIGKILL)
        code = self.process.wait()
        self._reader.join(1.0)
        status = self.end_status or {0: "ok", SKIPPED: f"skipped: {''.join(self.last_lines[-1:])}"}.get(
            code, f"failed: {_exit(code)}"
        )
        return Outcome(self.part.name, status, seconds, tuple(self.last_lines))

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self.process.pid, number)


def _exit(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def run(  # what a stage needs, by name
    stage: Sequence[Part],
    *,
    root: Path,
    environment: Mapping[str, str],
    say: Callable[[str, str], None],
    deadline: float,
    stopped: threading.Event,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Run the parts of a stage beside one another, each to its end, its limit, the deadline or a stop.

    deadline: on time.monotonic's clock; when it comes, parts are stopped that much earlier that they can say farewell.
    meanwhile: called while waiting, about every POLL_S.
    """
    last = deadline - FAREWELL_S
    reason = "a signal came" if stopped.is_set() else "no time was left" if time.monotonic() >= last else ""
    if reason:
        return [Outcome(part.name, f"not run: {reason}", 0.0) for part in stage]
    outcomes: dict[str, Outcome] = {}
    running: list[Running] = []
    for part in stage:
        try:
            running.append(Running(part, root=root, environment=environment, say=say))
        except OSError as error:
            say(part.name, f"{part.command[0]} could not be started: {error}")
            outcomes[part.name] = Outcome(part.name, f"failed: {error}", 0.0)
    while running:
        meanwhile()
        for each in list(running):
            end = min(each.began + each.part.limit_s, last)
            if each.has_ended:
                outcomes[each.part.name] = each.outcome()
                running.remove(each)
            elif not each.end_status and stopped.is_set():
                each.stop("stopped: a signal came")
            elif not each.end_status and time.monotonic() >= end:
                each.stop(f"failed: stopped after {end - each.began:.0f} s")
        time.sleep(POLL_S)
    return [outcomes[part.name] for part in stage]
