"""Checkpoint files: written atomically, verified by size and checksum, the two newest kept."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
from pathlib import Path
from typing import IO, Any

import torch

from fastbyol import atomic

KEEP = 2  # newest checkpoints
NAME = re.compile(r"step-(\d+)\.pt")
TRAILER = struct.Struct("<8sQ32s")  # magic, bytes before the trailer, their SHA-256
MAGIC = b"FASTBYOL"


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
        with atomic.replacement(final) as file:
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


def load_newest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Load the newest checkpoint that is whole; return it and one line for each newer one that is damaged.

    Only tensors and plain values are unpickled (weights_only). Raises CheckpointError when none is whole.
    """
    damaged: list[str] = []
    for _, path in reversed(_steps(folder)):
        try:
            archive = io.BytesIO(_read_archive(path))
            state: dict[str, Any] = torch.load(archive, map_location="cpu", weights_only=True)
            return state, damaged
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            damaged.append(f"{path} does not load ({reason}); trying the one before")
    reason = f": {damaged[0]}" if damaged else ""
    raise CheckpointError(f"{folder} holds no checkpoint to resume from{reason}; start anew without --resume")
