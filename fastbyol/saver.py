"""Know how to save while training goes on: a copy of the state now, the file from a thread of its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbyol import checkpoint

COPY_SHARE = 0.005  # of the time, at most, may go into copies, which hold up the step
WRITE_SHARE = 0.01  # into writing, which takes a core
EVERY_MIN_S, EVERY_MAX_S = 10.0, 900.0


class Cost:
    """Measure what a checkpoint costs: `copy_s` that the step waits, `write_s` in the background."""

    def __init__(self) -> None:
        self.copy_s = 0.0
        self.write_s = 0.0

    def interval_s(self) -> float:
        """Give the interval at which checkpoints cost their shares of the time at most; from 10 s to 15 minutes."""
        return min(max(self.copy_s / COPY_SHARE, self.write_s / WRITE_SHARE, EVERY_MIN_S), EVERY_MAX_S)

    def total_s(self) -> float:
        """Give the seconds from the call to the file."""
        return self.copy_s + self.write_s


def copy_to_host(value: Any) -> Any:
    """Copy the tensors of a nested state to the host; from a GPU the copies are only queued, into pinned memory."""
    if isinstance(value, dict):
        return {name: copy_to_host(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_host(entry) for entry in value)
    if not isinstance(value, Tensor):
        return value
    host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=value.is_cuda)


class Saver:
    """Write checkpoints of one run, one at a time. A write that fails is told by `failure`; older files stay."""

    def __init__(self, folder: Path, *, device: str) -> None:
        self.folder, self.device = folder, device
        self.cost = Cost()
        self.saved_step: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None
        self._has_finished = False

    @property
    def is_writing(self) -> bool:
        """Tell whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: dict[str, Any], *, step: int) -> None:
        """Copy the state and begin to write it; waits first for the write before."""
        self.wait()
        began_s = time.monotonic()
        taken = copy_to_host(state)
        queued = None
        if self.device == "cuda":
            queued = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            queued.record()
        self.cost.copy_s = time.monotonic() - began_s
        self._thread = threading.Thread(target=self._write, args=(taken, step, queued), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, state: dict[str, Any], step: int, queued: torch.cuda.Event | None) -> None:
        began_s = time.monotonic()
        if queued is not None:
            queued.synchronize()
        try:
            checkpoint.save(self.folder, state, step=step)
            self.saved_step = step
        except OSError as error:
            self._failure = error
        self.cost.write_s = time.monotonic() - began_s
        self._has_finished = True

    def pop_finished(self) -> bool:
        """Tell whether a write has finished since the last call."""
        finished, self._has_finished = self._has_finished, False
        return finished

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """Wait for nothing any more: the write under way ends with the process, and leaves no file under a name."""
        self._thread = None

    def pop_failure(self) -> OSError | None:
        """Give the error of the last finished write, once."""
        if self.is_writing:
            return None
        failed, self._failure = self._failure, None
        return failed
