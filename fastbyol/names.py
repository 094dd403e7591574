"""The names of a .beton's samples: NAME.beton.names.gz, a compressed text of a line a sample, name and content hash.

A name is the sample's path inside its source, a hash the first 16 hex digits of its stored image's BLAKE2b. Tabs, line
ends, backslashes and bytes that are no UTF-8 are escaped with backslashes. `zcat` shows the file; FFCV needs none.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

GROUP = 256  # lines that are compressed at a time
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


class Named(NamedTuple):
    """The name of a sample, and the hash of its stored image."""

    name: str
    content: str


def names_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a .beton file's names: NAME.beton.names.gz in the same folder."""
    return Path(f"{os.fspath(path)}.names.gz")


def hash_content(data: bytes | memoryview) -> str:
    """Hash a stored image to 16 hex digits; two images of a set differ by it unless they are the same."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class NamesWriter:
    """A writer of a names file, whose bytes depend on the names and images alone."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=self._file, mtime=0)
        self._lines: list[str] = []

    def add(self, name: str, content: str) -> None:
        """Add the next sample, with the hash of its stored image."""
        self._lines.append(f"{name.translate(_ESCAPES)}\t{content}\n")
        if len(self._lines) == GROUP:
            self._write_group()

    def _write_group(self) -> None:
        text = "".join(self._lines).encode(errors="surrogateescape").decode(errors="backslashreplace")
        self._gzip.write(text.encode())
        self._lines.clear()

    def __enter__(self) -> NamesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write_group()
            self._gzip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def read_names(path: str | os.PathLike[str]) -> list[Named] | None:
    """Read the names beside a .beton, as they are written; None where there are none, or the file is damaged."""
    try:
        with gzip.open(names_path(path), "rt", encoding="utf-8", newline="\n") as file:
            rows = [line.rstrip("\n").split("\t") for line in file]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    return [Named(*row) for row in rows] if all(len(row) == 2 for row in rows) else None
