"""Know the unfinished files of a write: locked while it lives, so that a later one can tell and remove what is dead."""

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
    """Create the hidden file in which a .beton grows; return it open and locked, its path, and its sidecar's path.

    The lock goes with the process, also by SIGKILL. Raises OSError that names `path` when the place is not writable.
    """
    while True:
        token = secrets.token_hex(4)
        partial, sidecar = (each.with_name(f".{each.name}.{token}.partial") for each in (path, sidecar_path(path)))
        try:
            stream = partial.open("xb", buffering=1 << 20)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        with contextlib.suppress(OSError):  # a file system without locks: then find_dead cannot lock either
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:  # else another write took it for dead before it was locked
            return stream, partial, sidecar
        stream.close()


def remove_dead(path: Path) -> tuple[list[Path], list[Path]]:
    """Remove what killed writes of this .beton left; return the files removed, and those that could not be judged.

    A file is dead when its lock can be taken. Those of writes still running are in neither list.
    """
    removed: list[Path] = []
    unknown: list[Path] = []
    names = sorted(os.listdir(path.parent))  # noqa: PTH208 - only names are needed
    for partial, sidecar in _pairs(path, names):
        # A write killed after the .beton had its name left only the sidecar; alive, it holds the lock there.
        held = partial if partial.name in names else path
        try:
            with held.open("rb") as stream:
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
            unknown.append(held)
    return removed, unknown


def _pairs(path: Path, names: list[str]) -> list[tuple[Path, Path]]:
    """Name the unfinished files of each write of this .beton of which one is there."""
    both = (path, sidecar_path(path))
    tokens = {
        match[1]
        for name in names
        for each in both
        if (match := re.fullmatch(rf"\.{re.escape(each.name)}\.([0-9a-f]{{8}})\.partial", name))
    }
    partial, sidecar = ([each.with_name(f".{each.name}.{token}.partial") for token in sorted(tokens)] for each in both)
    return list(zip(partial, sidecar, strict=True))
