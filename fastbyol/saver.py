"""Background checkpointing: the state is copied at once and written to disk by a thread."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbyol import checkpoint

COPY_SHARE = 0.005  # most of the time that copies, which block the step, may take
WRITE_SHARE = 0.01  # the same for writing, which takes a core
EVERY_MIN_S, EVERY_MAX_S = 10.0, 900.0


class Cost:
    """The measured cost of a checkpoint: `copy_s` in which the step waits, `write_s` in the background."""

    def __init__(self) -> None:
        self.copy_s = 0.0
        self.write_s = 0.0

    def interval_s(self) -> float:
        """Return the shortest interval at which both costs stay within their shares, from 10 s to 15 minutes."""
        return min(max(self.copy_s / COPY_SHARE, self.write_s / WRITE_SHARE, EVERY_MIN_S), EVERY_MAX_S)

    def total_s(self) -> float:
        """Return the seconds from the call of save() to the finished file."""
        return self.copy_s + self.write_s


def copy_to_host(value: Any) -> Any:
    """Copy the tensors of a nested state to the host; from a GPU the copies are queued, into pinned memory."""
    if isinstance(value, dict):
        return {name: copy_to_host(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_host(entry) for entry in value)
    if not isinstance(value, Tensor):
        return value
    host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=value.is_cuda)


class Saver:
    """A writer of one run's checkpoints, one at a time; pop_failure() reports a failed write, and older files stay."""

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
        """Copy the state and start writing it, after waiting for the previous write."""
        self.wait()
        began_s = time.monotonic()
        copy = copy_to_host(state)
        queued = None
        if self.device == "cuda":
            queued = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            queued.record()
        self.cost.copy_s = time.monotonic() - began_s
        self._thread = threading.Thread(target=self._write, args=(copy, step, queued), name="checkpoint", daemon=True)
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
        """Stop waiting for the current write: it ends with the process and leaves no checkpoint."""
        self._thread = None

    def pop_failure(self) -> OSError | None:
        """Return the error of the last finished write, once; None where it succeeded or still runs."""
        if self.is_writing:
            return None
        failure, self._failure = self._failure, None
        return failure
