"""Atomic replacement of files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacement(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that replaces `path`, synced to disk, when the with-block ends without an exception.

    Until then, and after an exception or a kill, the old file stays. Raises OSError where the disk refuses.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, so that a power cut does not bring the old file back."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, text: str) -> None:
    """Replace `path` by text as UTF-8, atomically; bytes of a name that is no UTF-8 are written as \\udcXX."""
    with replacement(path) as file:
        file.write(text.encode(errors="backslashreplace"))


class RecordFile:
    """An append-only file of records, each written whole or not at all; records the disk refuses are buffered.

    The file is opened at once and truncated to its first `keep_bytes` bytes (None: all of it), which needs no room on
    the disk; raises OSError where it cannot be opened. Later failures go to `warn`, once until a write succeeds again,
    and never raise.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None], keep_bytes: int | None = None) -> None:
        self.path = path
        self._warn = warn
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = os.fstat(self._file).st_size if keep_bytes is None else keep_bytes  # of the last record
        os.ftruncate(self._file, self._end)
        self._pending: deque[bytes] = deque()
        self._is_full = False

    @property
    def pending(self) -> int:
        """The number of buffered records."""
        return len(self._pending)

    def append(self, record: bytes) -> None:
        """Write the buffered records, then this one, as far as the disk accepts them."""
        self._pending.append(record)
        try:
            while self._pending:
                self._write(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            if not self._is_full:
                self._warn(
                    f"{self.path} cannot be written ({error.strerror}): its rows are buffered and training goes on; "
                    "free some disk space"
                )
            self._is_full = True
        else:
            self._is_full = False

    def _write(self, record: bytes) -> None:
        if self._is_full:  # the last attempt may have left half a record
            os.ftruncate(self._file, self._end)
        left, at = memoryview(record), self._end
        try:
            while left:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end = at

    def close(self) -> None:
        """Try a last time to write the buffered records, warn of those lost, and close; never raises."""
        if self._pending:
            self.append(b"")
        lost = sum(1 for record in self._pending if record)
        if lost:
            self._warn(f"{self.path} lacks its last {lost} rows: the disk stayed full")
        try:
            os.close(self._file)
        except OSError as error:  # a network file system may write only now
            self._warn(f"{self.path} may lack its last rows: it could not be closed ({error.strerror})")
