"""A fingerprint of a source's files and the settings, by which a .beton is known to be still what they give."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbyol.beton import BetonError, Reader
from fastbyol.data_prep.sources.base import SourceError, listing_progress

KEY = "fingerprint"  # in the sidecar


def fingerprint(paths: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """Digest the name, size and time of change of every file at or below the paths, and the settings; 32 hex digits.

    Nothing is read. Raises SourceError for a path that cannot be listed.
    """
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for path in paths:
        for file in listing_progress(_files(path)):
            try:
                facts = file.stat()
            except OSError as error:
                raise SourceError(f"{file}: cannot be read: {error.strerror}; check the path") from error
            digest.update(os.fsencode(f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\0"))
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Yield the files at or below a path in a fixed order, links followed; hidden ones are no part of a source."""
    if not path.is_dir():
        yield path.absolute()
        return
    for folder, folders, names in os.walk(path.absolute(), followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def recorded(out: Path) -> tuple[str, int] | None:
    """Return the fingerprint in a .beton's sidecar and its number of images; None unless it is intact and has one."""
    try:
        with Reader(out) as reader:
            found = reader.sidecar.get(KEY)
            return (found, len(reader)) if isinstance(found, str) else None
    except BetonError:
        return None
