"""The copy of a remote source: a hidden, locked folder beside the output that knows which of its files are whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from fastbyol.data_prep.remote.listing import Remote
from fastbyol.data_prep.remote.server import Entry

LOCK, FILES, UNFINISHED, WHOLE = "lock", "files", "unfinished", "whole.jsonl"


class Copy:
    """The files of a source that were fetched, in `files`; other processes wait for the end of the `with` block.

    Each file that is whole has a line in a list, with its name, size and stamp, so that it is not fetched again after
    a kill. What lies there without a line, or is no longer what the source lists, is removed at the beginning.
    """

    def __init__(self, path: Path, remote: Remote) -> None:
        self.path, self.files = path, path / FILES
        self._remote = remote
        self._unfinished = path / UNFINISHED

    def __enter__(self) -> Copy:
        lock = None
        while lock is None:  # another process may remove the folder before it is locked
            self.path.mkdir(exist_ok=True)
            lock = _lock(self.path, waits=True)
        self._lock = lock
        kept = self._keep_whole()
        for folder in (self._unfinished, self.files, *(self.files / name for name in self._remote.folders)):
            folder.mkdir(parents=True, exist_ok=True)
        self._whole = {file.name: size for file, size in kept}
        self._list = (self.path / WHOLE).open("w", encoding="ascii")
        self._write(kept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._list.close()
        self._lock.close()

    @property
    def missing(self) -> list[Entry]:
        """The files of the source that are not here."""
        return [file for file in self._remote.files if file.name not in self._whole]

    @property
    def begun_bytes(self) -> int:
        """The bytes of unfinished files."""
        count = 0
        for path in self._unfinished.iterdir():
            with suppress(FileNotFoundError):  # a transfer that ends just now
                count += path.stat().st_size
        return count

    @property
    def total_bytes(self) -> int:
        """The bytes of all that is here."""
        return sum(self._whole.values()) + self.begun_bytes

    def path_of(self, file: Entry) -> Path:
        """Return where a file is to lie, in a folder that is there."""
        path = self.files / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def unfinished(self, file: Entry) -> Path:
        """Return where a file lies until it is whole; a file that has changed at the server lies elsewhere."""
        key = os.fsencode("\0".join((file.name, str(file.size), file.stamp)))
        return self._unfinished / hashlib.blake2b(key, digest_size=16).hexdigest()

    def add(self, file: Entry, size: int) -> None:
        """Take note that a file is here and whole."""
        self._whole[file.name] = size
        self._write([(file, size)])

    def remove(self) -> None:
        """Remove the copy."""
        _remove(self.path)

    def _write(self, whole: Sequence[tuple[Entry, int]]) -> None:
        self._list.writelines(f"{json.dumps([file.name, size, file.stamp])}\n" for file, size in whole)
        self._list.flush()

    def _keep_whole(self) -> list[tuple[Entry, int]]:
        """Remove all that is not a whole file of the source; return the files that are left, with their sizes."""
        noted: dict[str, tuple[int, str]] = {}
        if (self.path / WHOLE).exists():
            for line in (self.path / WHOLE).read_text(encoding="ascii").splitlines(keepends=True):
                if line.endswith("\n"):  # else a kill cut it
                    name, size, stamp = json.loads(line)
                    noted[name] = size, stamp
        kept = []
        for file in self._remote.files:
            size, stamp = noted.get(file.name, (-1, ""))
            path = self.files / file.name
            if stamp == file.stamp and file.size in (None, size) and path.is_file() and path.stat().st_size == size:
                kept.append((file, size))
        names, unfinished = {file.name for file, _ in kept}, {self.unfinished(file) for file in self._remote.files}
        for above, folders, files in os.walk(self.files, topdown=False):
            for name in files:
                if Path(above, name).relative_to(self.files).as_posix() not in names:
                    Path(above, name).unlink()
            for name in folders:
                if not any(Path(above, name).iterdir()):
                    Path(above, name).rmdir()
        for path in set(self._unfinished.glob("*")) - unfinished:
            path.unlink()
        return kept


def copy_path(folder: Path, owner: str, remote: Remote) -> Path:
    """Return where the copy of a source lies in a folder; owner: the output, or where that has no name, the source."""
    return folder.absolute() / f".{owner}.{remote.digest}.fetched"


def remove_stale(folder: Path, owner: str, *, keep: Path | None) -> list[Path]:
    """Remove the copies of one owner that no running process holds; return them."""
    removed = []
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 - only names are needed
        path = folder.absolute() / name
        if path == keep or not re.fullmatch(rf"\.{re.escape(owner)}\.[0-9a-f]{{8}}\.fetched", name):
            continue
        lock = _lock(path, waits=False)
        if lock is not None:
            with lock:
                _remove(path)
            removed.append(path)
    return removed


def _remove(path: Path) -> None:
    """Remove a copy that is locked.

    The list goes first, so that what a kill leaves is not taken for whole; the lock goes last, so that a process that
    begins meanwhile waits. One that begins after that has a lock of its own there, and the folder with it.
    """
    (path / WHOLE).unlink(missing_ok=True)
    for inside in path.iterdir():
        if inside.is_dir():
            shutil.rmtree(inside)
        elif inside.name != LOCK:
            inside.unlink()
    (path / LOCK).unlink()
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _lock(path: Path, *, waits: bool) -> IO[bytes] | None:
    """Lock a copy until the file is closed; None if it was removed, or is in use by a process that is not awaited.

    On a file system without locks nothing is held.
    """
    try:
        lock = (path / LOCK).open("ab")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not waits:
            lock.close()
            return None
        print(f"fastbyol-prep: note: waits for another write, which fetches to {path}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return lock
    if os.fstat(lock.fileno()).st_nlink:
        return lock
    lock.close()
    return None
