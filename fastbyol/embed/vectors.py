"""Vectors of the images of a .beton, computed into a file that a command goes on with after it was killed.

The file begins with HEADER_BYTES of text: MAGIC, the key of the work, the number of images done, and a digest of the
command. A record for each image follows, in the order of the .beton: its sample number, or LEFT_OUT if it does not
decode, and its vector.
"""

from __future__ import annotations

import copy
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.errors import ConfigError, require
from fastbyol.evaluate import features
from fastbyol.evaluate.images import InputSettings
from fastbyol.model.parts import Encoder

DTYPES = ("float32", "float16")
LEFT_OUT = -1
MAGIC = "fastbyol-embed"
HEADER_BYTES = 128
SAVE_S = 2.0  # between two notes of what is done
Dtype = Literal["float32", "float16"]


class Vectors:
    """N vectors of F numbers that lie in a file, in the order of their images.

    samples: int64 [N], their numbers in the .beton; left_out: the number of images that do not decode. Memory holds
    only what is asked for.
    """

    def __init__(self, records: NDArray[Any]) -> None:
        self._values = records["values"]
        self._rows = np.flatnonzero(records["sample"] != LEFT_OUT)
        self.samples: NDArray[np.int64] = records["sample"][self._rows]
        self.left_out = len(records) - len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def features(self) -> int:
        """The length of a vector."""
        return int(self._values.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the numbers: float32 or float16."""
        return self._values.dtype

    def part(self, rows: NDArray[np.int64]) -> Vectors:
        """Return these rows alone."""
        chosen = copy.copy(self)
        chosen._rows, chosen.samples = self._rows[rows], self.samples[rows]
        return chosen

    def block(self, first: int, end: int) -> NDArray[Any]:
        """Read the vectors from `first` up to `end`, [n, F], contiguous."""
        return np.ascontiguousarray(self._values[self._rows[first:end]])

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read the vectors of these rows, [n, F]."""
        return np.ascontiguousarray(self._values[self._rows[rows]])


class Partial:
    """The file of the vectors computed so far, locked while it is open; `done` counts its records.

    key: names the encoder, the images and the settings; what another key left is overwritten. command: the
    digest that read_command returns. Raises ConfigError where another process has the file open.
    """

    def __init__(self, path: Path, key: str, *, width: int, dtype: Dtype, command: str = "") -> None:
        self.path = path
        self.record = np.dtype([("sample", "<i8"), ("values", np.dtype(dtype).newbyteorder("<"), (width,))])
        self._key, self._command = key, command
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        try:
            self._lock()
            self.done = self._read_done()
            self._file.truncate(HEADER_BYTES + self.done * self.record.itemsize)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise
        self._saved_s = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process writes {self.path}; wait until it ends, or give another --out"
            ) from None
        except OSError:  # a file system without locks
            return

    def _read_done(self) -> int:
        """Return the records that a killed command of this key has left, in whole batches."""
        words = _words(self._file.read(HEADER_BYTES))
        held = (os.fstat(self._file.fileno()).st_size - HEADER_BYTES) // self.record.itemsize
        is_ours = len(words) > 2 and words[:2] == [MAGIC, self._key] and words[2].isdecimal()
        return int(words[2]) if is_ours and int(words[2]) <= held else 0

    def append(self, samples: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Append the records of a batch."""
        records = np.empty(len(samples), self.record)
        records["sample"], records["values"] = samples, values
        self._file.write(records.tobytes())
        self._file.flush()
        self.done += len(samples)
        if time.monotonic() - self._saved_s > SAVE_S:
            self.save()

    def save(self) -> None:
        """Note what is done, after it has reached the disk."""
        os.fsync(self._file.fileno())
        header = f"{MAGIC} {self._key} {self.done} {self._command}\n"
        os.pwrite(self._file.fileno(), header.ljust(HEADER_BYTES).encode(), 0)
        self._saved_s = time.monotonic()

    def vectors(self) -> Vectors:
        """Map the vectors that are done."""
        self.save()
        return Vectors(np.memmap(self.path, self.record, "r", HEADER_BYTES, (self.done,)))

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if not isinstance(error, OSError):  # the disk may be full
                self.save()


def read_command(path: Path) -> str:
    """Return the digest of the command that left a file of Partial, "" where there is none."""
    try:
        with path.open("rb") as file:
            words = _words(file.read(HEADER_BYTES))
    except OSError:
        return ""
    return words[3] if len(words) == 4 and words[0] == MAGIC else ""


def _words(header: bytes) -> list[str]:
    return header.decode("ascii", "replace").split()


def compute(
    encoder: Encoder,
    reader: Reader,
    inputs: InputSettings,
    partial: Partial,
    *,
    has_unit_length: bool,
    stop: Callable[[], bool],
) -> None:
    """Compute the vectors of the images that `partial` lacks; raise ConfigError for numbers that are not finite.

    An image that does not decode is left out where inputs.on_error is "skip". has_unit_length: each vector is divided
    by its length.
    """
    dtype = torch.from_numpy(np.empty(0, partial.record["values"].base)).dtype

    def take(found: Tensor, images: NDArray[np.int64], done: int) -> None:
        values = F.normalize(found.float(), dim=1) if has_unit_length else found.float()
        numbers = values.to(dtype).cpu().numpy()
        _check_finite(numbers, reader)
        asked = np.arange(done, done + len(images), dtype=np.int64)
        partial.append(np.where(images == asked, asked, LEFT_OUT), numbers)

    everything = np.arange(len(reader), dtype=np.int64)
    features.stream(encoder, reader, everything, inputs, take=take, stop=stop, done=partial.done)


def _check_finite(numbers: NDArray[Any], reader: Reader) -> None:
    broken = int((~np.isfinite(numbers)).any(1).sum())
    remedy = (
        "give --dtype float32, or --normalize"
        if numbers.dtype == np.float16
        else "the encoder has diverged: train it again, with a smaller --base-lr"
    )
    require(broken == 0, f"the vectors of {reader.path} hold NaN or inf in {broken} of {len(numbers)} images; {remedy}")
