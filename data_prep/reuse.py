"""A fingerprint of a source's files and the settings, by which a .beton is known to be what they give."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastbyol.beton import BetonError, Reader
from fastbyol.data_prep.sources.base import listing_progress
from fastbyol.data_prep.sources.folder import is_visible_file, readable, walk

KEY = "fingerprint"  # in the sidecar
NAME_LENGTH = 40  # of a source, in the name of its .beton


def fingerprint(paths: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """Digest the path, size and time of change of every file and folder there, and the settings.

    Nothing is read. Raises SourceError for a path that cannot be listed.
    """
    return digest_of(listing_progress(_readable_files(paths)), settings)


def digest_of(facts: Iterable[tuple[str, object, object]], settings: Mapping[str, Any]) -> str:
    """Digest the name and two facts of each file of a source, and the settings; 32 hex digits."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, size, stamp in facts:
        digest.update(os.fsencode(f"{name}\0{size}\0{stamp}\0"))
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


def file_name(source: str, digest: str) -> str:
    """Name the .beton of a source in its state: after the source's own name, and by the digest."""
    return f"{plain_name(source)}-{digest[:12]}.beton"


def plain_name(source: str) -> str:
    """Return a source's own name as a part of a file's."""
    return re.sub(r"[^\w.-]+", "-", source)[:NAME_LENGTH].strip("-") or "images"


def newest_of(folder: Path, source: str) -> Path | None:
    """Return the newest .beton in a folder that was written from a source, in whatever state; None if none was."""
    found = []
    for path in folder.glob("*.beton"):
        with suppress(BetonError), Reader(path) as reader:
            if reader.sidecar.get("source") == source:
                found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def count_if_whole(out: Path, digest: str) -> int | None:
    """Return the number of images of a .beton; None unless it can be read and has this fingerprint in its sidecar."""
    try:
        with Reader(out) as reader:
            return len(reader) if reader.sidecar.get(KEY) == digest else None
    except BetonError:
        return None
