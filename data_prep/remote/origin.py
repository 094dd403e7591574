"""A source that was fetched, named by its address: in its sidecar, and in each message about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastbyol.data_prep.sources.base import Sample, Source, SourceError


@dataclass(frozen=True)
class Origin:
    """Where a copy was fetched from.

    address, path: the source there and here; root, folder: the part of the address that the folder of the copy stands
    for, and that folder.
    """

    address: str
    path: Path
    root: str
    folder: Path

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Let each SourceError of the with-block name places there."""
        try:
            yield
        except SourceError as error:
            text = str(error).replace(str(self.path), self.address).replace(str(self.folder), self.root)
            raise SourceError(text) from error


class FetchedSource:
    """A source that is read from a copy, and named by its address."""

    def __init__(self, source: Source, origin: Origin) -> None:
        self._source, self._origin = source, origin
        self.path = origin.address
        self.class_names, self.class_counts = source.class_names, source.class_counts
        self.count, self.ignored = source.count, source.ignored

    def __iter__(self) -> Iterator[Sample]:
        with self._origin.errors():
            yield from self._source
