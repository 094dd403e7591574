"""The journal of a write: what of it is on the disk, so that after a kill the same command goes on behind that.

Its first line is the key of the write, each further one a sample: an image that was stored, or one that was left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

KEY, IMAGE, SKIPPED = "write", "image", "skipped"
_ENCODER = json.JSONEncoder(check_circular=False)  # entries hold no circles


class Stored(NamedTuple):
    """An image that was stored: its record, its name, the hash of its content, and what was repaired."""

    mode: int
    width: int
    height: int
    size: int
    label: int | None
    name: str
    content: str
    notes: list[str]


class Skipped(NamedTuple):
    """A sample that was left out, and why."""

    name: str
    reason: str


class Journal:
    """A journal that is written in groups, each after the images it tells of."""

    def __init__(self, path: Path, key: str, *, keep_bytes: int) -> None:
        self._file = path.open("r+b" if keep_bytes else "wb")
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        self._lines: list[str] = [] if keep_bytes else [json.dumps([KEY, key])]

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, entry: Stored | Skipped) -> None:
        """Add an entry to the present group."""
        self._lines.append(_ENCODER.encode([IMAGE if isinstance(entry, Stored) else SKIPPED, *entry]))

    def write_group(self) -> None:
        """Write the present group; what it tells of must be on its way to the disk."""
        lines, self._lines = self._lines, []  # first, so that an interrupt in the midst leads to no second time
        self._file.write("".join(f"{line}\n" for line in lines).encode("ascii"))
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def is_of(path: Path, key: str) -> bool:
    """Return whether a journal is there and of this write."""
    try:
        with path.open("rb") as file:
            return file.readline(1 << 16) == f"{json.dumps([KEY, key])}\n".encode("ascii")
    except OSError:
        return False


def read(path: Path) -> Iterator[tuple[Stored | Skipped, int]]:
    """Yield the entries of a journal, each with the bytes up to its end; stop at the first that is not whole."""
    with path.open("rb") as file:
        end = len(file.readline())
        for line in file:
            end += len(line)
            try:
                kind, *fields = json.loads(line)
                entry = Stored(*fields) if kind == IMAGE else Skipped(*fields)
            except (ValueError, TypeError):
                return
            if not line.endswith(b"\n"):
                return
            yield entry, end
