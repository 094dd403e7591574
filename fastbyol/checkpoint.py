"""Know how a run survives: checkpoints whole or absent, checked by size and checksum, the two newest kept."""

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

KEPT = 2
NAME = re.compile(r"step-(\d+)\.pt")
TRAILER = struct.Struct("<8sQ32s")  # magic, bytes before the trailer, their SHA-256
MAGIC = b"FASTBYOL"


class CheckpointError(ValueError):
    """Tell the user that no checkpoint of a run can be loaded, and what to do."""


class _Hashed:
    """Pass what is written on to a file; count and hash it."""

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
    """Tell whether any checkpoint was written, readable or not."""
    return bool(_steps(folder))


def save(folder: Path, state: dict[str, Any], *, step: int) -> Path:
    """Write `state` as checkpoint `step`; keep it and the one before, drop all others.

    The file appears under its name only when it is complete and on disk. Raises OSError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:09d}.pt"
    try:
        with atomic.replacement(final) as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)  # type: ignore[arg-type]  # it needs write and flush alone
            file.write(TRAILER.pack(MAGIC, hashed.size, hashed.hash.digest()))
    except RuntimeError as error:  # how torch's archive writer reports a failed write
        if isinstance(error.__context__, KeyboardInterrupt):  # it was a signal that broke it
            raise KeyboardInterrupt from error
        raise OSError(f"{final} cannot be written: {str(error).partition(chr(10))[0]}; is the disk full?") from error
    drop_after(folder, step)  # damaged, else the run would stand there
    older = [path for number, path in _steps(folder) if number < step]
    for path in older[: 1 - KEPT]:
        path.unlink()
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after a step: those that did not load, so that the good one before them is kept."""
    for number, path in _steps(folder):
        if number > step:
            path.unlink()


def _checked(path: Path) -> bytes:
    """Read a checkpoint's archive; raise EOFError where size or checksum differ from the trailer's."""
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
    """Load the newest checkpoint that reads, with one line for each newer one that did not.

    Only tensors and plain values are unpickled (weights_only). Raises CheckpointError when none reads.
    """
    damaged: list[str] = []
    for _, path in reversed(_steps(folder)):
        try:
            archive = io.BytesIO(_checked(path))
            state: dict[str, Any] = torch.load(archive, map_location="cpu", weights_only=True)
            return state, damaged
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            damaged.append(f"{path} does not load ({reason}); trying the one before")
    said = f": {damaged[0]}" if damaged else ""
    raise CheckpointError(f"{folder} holds no checkpoint to resume from{said}; start anew without --resume")
