"""Unfinished files of a write, locked while it runs, so that a later write can find and remove stale ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import BinaryIO

from fastbyol.beton import sidecar_path


def create(path: Path) -> tuple[BinaryIO, Path, Path]:
    """Create the hidden file of an unfinished .beton; return it open and locked, its path, and its sidecar's path.

    The lock ends with the process, even by SIGKILL. Raises OSError with `path` if the folder is not writable.
    """
    while True:
        token = secrets.token_hex(4)
        partial, sidecar = (each.with_name(f".{each.name}.{token}.partial") for each in (path, sidecar_path(path)))
        try:
            stream = partial.open("xb", buffering=1 << 20)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        with contextlib.suppress(OSError):  # a file system without locks: then remove_stale cannot lock either
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:  # else another write removed it as stale before it was locked
            return stream, partial, sidecar
        stream.close()


def remove_stale(path: Path) -> tuple[list[Path], list[Path]]:
    """Remove the files left by killed writes of this .beton; return the removed files and those of unknown state.

    A file is stale if its lock can be taken. The files of running writes are in neither list.
    """
    removed: list[Path] = []
    unknown: list[Path] = []
    names = sorted(os.listdir(path.parent))  # noqa: PTH208 - only names are needed
    for partial, sidecar in _pairs(path, names):
        # A write killed after renaming the .beton left only the sidecar; if it still runs, it has the .beton locked.
        locked = partial if partial.name in names else path
        try:
            with locked.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = [each for each in (partial, sidecar) if each.exists()]
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


def _pairs(path: Path, names: list[str]) -> list[tuple[Path, Path]]:
    """List the unfinished (.beton, sidecar) of each write of this .beton that left at least one of them."""
    both = (path, sidecar_path(path))
    tokens = {
        match[1]
        for name in names
        for each in both
        if (match := re.fullmatch(rf"\.{re.escape(each.name)}\.([0-9a-f]{{8}})\.partial", name))
    }
    partial, sidecar = ([each.with_name(f".{each.name}.{token}.partial") for token in sorted(tokens)] for each in both)
    return list(zip(partial, sidecar, strict=True))
