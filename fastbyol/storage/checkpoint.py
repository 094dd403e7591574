"""Checkpoint files: written atomically, verified by size and checksum, the two newest kept."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import struct
import threading
import time
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastbyol.storage import files

KEEP = 2  # newest checkpoints
NAME = re.compile(r"step-(\d+)\.pt")
TRAILER = struct.Struct("<8sQ32s")  # magic, bytes before the trailer, their SHA-256
MAGIC = b"FASTBYOL"
DAMAGES = (RuntimeError, pickle.UnpicklingError, EOFError, OSError)  # what a checkpoint that does not load raises


class CheckpointError(ValueError):
    """No checkpoint of a run can be loaded; the message says what to do."""


class _HashingWriter:
    """A writer to a file that counts and hashes the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _steps(folder: Path) -> list[tuple[int, Path]]:
    matches = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*.pt"))
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def exists(folder: Path) -> bool:
    """Tell whether the folder holds a checkpoint, readable or not."""
    return bool(_steps(folder))


def save(folder: Path, state: dict[str, Any], *, step: int) -> Path:
    """Write `state` as the checkpoint of `step`; keep it and the one before, remove all others.

    The file takes its name only when it is complete and on disk. Raises OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:09d}.pt"
    try:
        with files.replacement(final) as file:
            hashed = _HashingWriter(file)
            torch.save(state, hashed)  # type: ignore[arg-type]  # it needs write and flush alone
            file.write(TRAILER.pack(MAGIC, hashed.size, hashed.hash.digest()))
    except RuntimeError as error:  # torch's archive writer reports a failed write so
        if isinstance(error.__context__, KeyboardInterrupt):  # a signal interrupted the write
            raise KeyboardInterrupt from error
        raise OSError(f"{final} cannot be written: {str(error).partition(chr(10))[0]}; is the disk full?") from error
    drop_after(folder, step)  # newer ones are damaged: otherwise the run would have resumed from them
    older = [path for number, path in _steps(folder) if number < step]
    for path in older[: 1 - KEEP]:
        path.unlink()
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after a step: they did not load, and count against the good one before them."""
    for number, path in _steps(folder):
        if number > step:
            path.unlink()


def _read_archive(path: Path) -> bytes:
    """Read a checkpoint's archive; raise EOFError where its size or checksum differs from the trailer's."""
    data = path.read_bytes()
    if len(data) < TRAILER.size:
        raise EOFError(f"{len(data)} bytes")
    magic, size, digest = TRAILER.unpack(data[-TRAILER.size :])
    if magic != MAGIC or size != len(data) - TRAILER.size:
        raise EOFError("cut short, or not a checkpoint")
    archive = data[: -TRAILER.size]
    if hashlib.sha256(archive).digest() != digest:
        raise EOFError("its checksum differs")
    return archive


def is_checkpoint(path: Path) -> bool:
    """Tell whether a file ends as checkpoints do."""
    with path.open("rb") as file:
        file.seek(-min(TRAILER.size, path.stat().st_size), os.SEEK_END)
        return file.read(len(MAGIC)) == MAGIC


def load(path: Path) -> dict[str, Any]:
    """Load one checkpoint, tensors and plain values alone (weights_only); raise CheckpointError where it is damaged."""
    try:
        return _load(path)
    except DAMAGES as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} does not load ({reason}); give another checkpoint of the run") from error


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(_read_archive(path)), map_location="cpu", weights_only=True)
    return state


def load_newest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Load the newest checkpoint that is whole; return it and one line for each newer one that is damaged.

    Only tensors and plain values are unpickled (weights_only). Raises CheckpointError when none is whole.
    """
    damaged: list[str] = []
    for _, path in reversed(_steps(folder)):
        try:
            return _load(path), damaged
        except DAMAGES as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            damaged.append(f"{path} does not load ({reason}); trying the one before")
    reason = f": {damaged[0]}" if damaged else ""
    raise CheckpointError(f"{folder} holds no checkpoint to resume from{reason}; start anew without --resume")


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
            save(self.folder, state, step=step)
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
