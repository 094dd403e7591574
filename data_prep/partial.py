"""Unfinished files of a write, locked while it runs, so that a later write can find and remove stale ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbyol.beton import sidecar_path
from fastbyol.data_prep import journal
from fastbyol.names import names_path

BUFFER_BYTES = 1 << 20


class Unfinished(NamedTuple):
    """The hidden files of an unfinished write, and the first one open and locked; the lock ends with the process."""

    stream: BinaryIO
    beton: Path
    sidecar: Path
    names: Path
    journal: Path
    is_continued: bool


def companions(path: Path) -> tuple[Path, Path, Path]:
    """Return the paths of a .beton and the files beside it: its sidecar and its names."""
    return path, sidecar_path(path), names_path(path)


def create(path: Path, key: str | None = None) -> Unfinished:
    """Create the hidden file of an unfinished .beton; raise OSError with `path` if the folder is not writable.

    key: that of the write; where a killed write with this key left its files, these are taken instead.
    """
    found = None if key is None else _continue(path, key)
    if found is not None:
        return found
    while True:
        files = _hidden(path, secrets.token_hex(4))
        try:
            stream = files[0].open("xb", buffering=BUFFER_BYTES)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        with contextlib.suppress(OSError):  # a file system without locks: then remove_stale cannot lock either
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:  # else another write removed it as stale before it was locked
            return Unfinished(stream, *files, is_continued=False)
        stream.close()


def _continue(path: Path, key: str) -> Unfinished | None:
    """Open and lock the files of a killed write with this key; None where there are none."""
    for files in _unfinished(path, os.listdir(path.parent)):  # noqa: PTH208 - only names are needed
        if not journal.is_of(files[3], key):
            continue
        try:
            stream = files[0].open("r+b", buffering=BUFFER_BYTES)
        except FileNotFoundError:
            continue
        try:
            is_ours = _lock(stream) and os.path.samestat(os.fstat(stream.fileno()), os.stat(files[0]))  # noqa: PTH116
        except FileNotFoundError:  # it got its name in the meantime, as another file under this one would tell
            is_ours = False
        if is_ours:
            return Unfinished(stream, *files, is_continued=True)
        stream.close()
    return None


def _lock(stream: BinaryIO) -> bool:
    """Lock a file; return False if another process holds it. On a file system without locks nothing is held."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def can_continue(path: Path) -> bool:
    """Return whether a write of this .beton left files to go on from."""
    return any(files[3].exists() for files in _unfinished(path, os.listdir(path.parent)))  # noqa: PTH208 - as above


def remove_stale(path: Path, *, keep: str | None = None) -> tuple[list[Path], list[Path]]:
    """Remove the files left by killed writes of this .beton; return the removed files and those of unknown state.

    A file is stale if its lock can be taken. The files of running writes are in neither list, nor are those of a killed
    one with the key `keep`.
    """
    removed: list[Path] = []
    unknown: list[Path] = []
    names = sorted(os.listdir(path.parent))  # noqa: PTH208 - only names are needed
    for files in _unfinished(path, names):
        if keep is not None and files[0].name in names and journal.is_of(files[3], keep):
            continue
        # A write killed after renaming the .beton left only the others; if it still runs, it has the .beton locked.
        locked = files[0] if files[0].name in names else path
        try:
            with locked.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = [each for each in files if each.exists()]
                for each in left:
                    each.unlink(missing_ok=True)
                removed += left[:1]
        except BlockingIOError:
            continue
        except FileNotFoundError:
            continue
        except OSError:
            unknown.append(locked)
    return removed, unknown


def _hidden(path: Path, token: str) -> tuple[Path, Path, Path, Path]:
    """Return the hidden files of a write: those of the .beton and its companions, and the journal."""
    beton, sidecar, names, log = (each.with_name(f".{each.name}.{token}.partial") for each in _all(path))
    return beton, sidecar, names, log


def _all(path: Path) -> tuple[Path, ...]:
    return *companions(path), Path(f"{path}.journal")


def _unfinished(path: Path, names: list[str]) -> list[tuple[Path, Path, Path, Path]]:
    """List the unfinished files of each write of this .beton that left at least one of them."""
    tokens = {
        match[1]
        for name in names
        for each in _all(path)
        if (match := re.fullmatch(rf"\.{re.escape(each.name)}\.([0-9a-f]{{8}})\.partial", name))
    }
    return [_hidden(path, token) for token in sorted(tokens)]
