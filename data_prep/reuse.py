"""A fingerprint of a source's files and the settings, by which a .beton is known to be what they give."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbyol.beton import BetonError, Reader
from fastbyol.data_prep.sources.base import listing_progress
from fastbyol.data_prep.sources.folder import is_visible_file, readable, walk

KEY = "fingerprint"  # in the sidecar
NAME_LENGTH = 40  # of a source, in the name of its .beton


def fingerprint(paths: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """Digest the path, size and time of change of every file and folder there, and the settings; 32 hex digits.

    Nothing is read. Raises SourceError for a path that cannot be listed.
    """
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, size, changed_ns in listing_progress(_readable_files(paths)):
        digest.update(os.fsencode(f"{name}\0{size}\0{changed_ns}\0"))
    return digest.hexdigest()


def _readable_files(paths: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    for path in paths:
        with readable(path):
            yield from _files(path.absolute())


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of change of the files at or below a path, as a folder source reads them.

    Folders come with zeros: an empty one may be a class.
    """
    if not path.is_dir():
        facts = path.stat()
        yield str(path), facts.st_size, facts.st_mtime_ns
        return
    for folder in walk(path):
        yield str(path / folder), 0, 0
        with os.scandir(path / folder) as entries:
            files = sorted((entry.path, entry.stat()) for entry in entries if is_visible_file(entry))
        yield from ((name, facts.st_size, facts.st_mtime_ns) for name, facts in files)


def file_name(source: Path, digest: str) -> str:
    """Name the .beton of a source in its state: after the source, and by the digest."""
    name = re.sub(r"[^\w.-]+", "-", source.absolute().name)[:NAME_LENGTH].strip("-") or "images"
    return f"{name}-{digest[:12]}.beton"


def count_if_whole(out: Path, digest: str) -> int | None:
    """Return the number of images of a .beton; None unless it can be read and has this fingerprint in its sidecar."""
    try:
        with Reader(out) as reader:
            return len(reader) if reader.sidecar.get(KEY) == digest else None
    except BetonError:
        return None
