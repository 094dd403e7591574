"""Know how a file grows by whole records on a disk that may be full for a while."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path


class RecordFile:
    """Append records to a file, each whole or not at all; what the disk refuses is kept and offered again.

    The file is opened at once and cut to its first `keep_bytes` bytes (None: all of it), which needs no room on disk;
    raises OSError where it cannot be opened. Later failures are told to `warn`, once until a write succeeds again,
    and raise nothing.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None], keep_bytes: int | None = None) -> None:
        self.path = path
        self._warn = warn
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = os.fstat(self._file).st_size if keep_bytes is None else keep_bytes  # of the last whole record
        os.ftruncate(self._file, self._end)
        self._pending: deque[bytes] = deque()
        self._refused = False

    @property
    def pending(self) -> int:
        """Count the records that wait for room."""
        return len(self._pending)

    def append(self, record: bytes) -> None:
        """Write the records that wait, then this one, as far as the disk takes them."""
        self._pending.append(record)
        try:
            while self._pending:
                self._write(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            if not self._refused:
                self._warn(f"{self.path} does not grow ({error.strerror}); training goes on, its rows wait for room")
            self._refused = True
        else:
            self._refused = False

    def _write(self, record: bytes) -> None:
        if self._refused:  # the last try may have left half a record
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
        """Offer what waits a last time, say what is lost, and close; raises nothing."""
        if self._pending:
            self.append(b"")
        lost = sum(1 for record in self._pending if record)
        if lost:
            self._warn(f"{self.path} lacks its last {lost} rows: the disk took them no more")
        try:
            os.close(self._file)
        except OSError as error:  # where a network's file system writes only now
            self._warn(f"{self.path} may lack its last rows: it could not be closed ({error.strerror})")
