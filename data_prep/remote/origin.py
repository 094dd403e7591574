"""A source that was fetched, named by its address: in its sidecar, and in each message about it."""

from __future__ import annotations

from collections import Counter
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
            raise SourceError(self.named_there(str(error))) from error

    def named_there(self, text: str) -> str:
        """Return a text with the places there for those in the copy."""
        return text.replace(str(self.path), self.address).replace(str(self.folder), self.root)


class FetchedSource:
    """A source that is read from a copy, and named by its address."""

    def __init__(self, source: Source, origin: Origin) -> None:
        self._source, self._origin = source, origin
        self.path = origin.address
        self.class_names, self.class_counts = source.class_names, source.class_counts
        self.count = source.count
        self.ignored = Counter({origin.named_there(kind): count for kind, count in source.ignored.items()})

    def __iter__(self) -> Iterator[Sample]:
        with self._origin.errors():
            yield from self._source
