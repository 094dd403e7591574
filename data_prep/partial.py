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
    of_write = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{8}})\.partial")
    for name in sorted(os.listdir(path.parent)):  # noqa: PTH208 - only names are needed
        if not (match := of_write.fullmatch(name)):
            continue
        partial = path.with_name(name)
        sidecar = path.with_name(f".{sidecar_path(path).name}.{match[1]}.partial")
        try:
            with partial.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink(missing_ok=True)
                sidecar.unlink(missing_ok=True)
        except BlockingIOError:
            continue
        except FileNotFoundError:
            continue
        except OSError:
            unknown.append(partial)
        else:
            removed.append(partial)
    return removed, unknown
