"""A source that reads a folder of images: class folders with all that lies below them, or images without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from fastbyol.data_prep.formats import HEAD_BYTES, SUFFIXES, is_image_file, kind_of
from fastbyol.data_prep.sources.base import Sample, SourceError, listing_progress
from fastbyol.data_prep.sources.classes import Labels, group_by_class

IDX_IMAGES = "images-idx3-ubyte"  # in the name of a file of images, as of MNIST


class FolderSource:
    """Images in a folder and in the folders below it; files and folders may be symbolic links.

    An image is what has an image's suffix or, without any suffix, an image's first bytes. Hidden files are no part of
    it. The classes are those of classes.group_by_class; samples are ordered by class, folder and name.
    """

    def __init__(self, path: Path, *, labels: Labels = "auto") -> None:
        self.path = path
        self.ignored: Counter[str] = Counter()
        counts: dict[PurePosixPath, int] = {}
        with readable(path):
            for folder in listing_progress(walk(path), " folders"):
                place, counts[folder] = path / folder, 0
                for name in listing_progress(visible_files(place)):
                    if _is_image_file(place, name):
                        counts[folder] += 1
                    else:
                        self.ignored[kind_of(name)] += 1
        self.count = sum(counts.values())
        if not self.count:
            raise SourceError(f"{path}: no images in it or in folders below it; {self._advice()}")
        self._groups = group_by_class(path, counts, labels)
        self.class_names = self._groups.names
        self.class_counts = self._groups.counts
        self.ignored.update(self._groups.left_out)
        self.count -= sum(self._groups.left_out.values())

    def __iter__(self) -> Iterator[Sample]:
        with readable(self.path):
            for label, folder in self._groups:
                place = self.path / folder
                names = [name for name in listing_progress(visible_files(place)) if _is_image_file(place, name)]
                above = "" if folder == PurePosixPath() else f"{folder}/"
                for name in sorted(names):
                    yield Sample(f"{above}{name}", label, place / name)

    def _advice(self) -> str:
        """Suggest what to give instead: archives, tables or files of MNIST's kind."""
        for folder, folders, names in os.walk(self.path):
            folders.sort()
            if tars := sorted(name for name in names if name.endswith(".tar")):
                return (
                    f"{len(tars)} archives such as {tars[0]} lie in {folder}: give one of them, or a quoted pattern "
                    f"such as '{folder}/*.tar' for WebDataset shards"
                )
            if any(name.endswith((".parquet", ".arrow")) for name in names):
                return f"tables lie deeper: give {folder} instead"
            if images := sorted(str(Path(folder, name)) for name in names if IDX_IMAGES in name):
                return f"files of MNIST's kind lie in {folder}: give {' or '.join(images)}"
        return f"known suffixes are {' '.join(sorted(SUFFIXES))}"


def walk(path: Path) -> Iterator[PurePosixPath]:
    """Yield each visible folder from the path down, relative to it, sorted; raise SourceError for a circle of links."""
    waiting = [(PurePosixPath(), frozenset[tuple[int, int]]())]
    while waiting:
        folder, above = waiting.pop()
        place = path / folder
        facts = place.stat()
        identity = (facts.st_dev, facts.st_ino)
        if identity in above:
            raise SourceError(f"{place}: a link to a folder above it; remove it")
        yield folder
        with os.scandir(place) as entries:
            inside = sorted((e.name for e in entries if not e.name.startswith(".") and e.is_dir()), reverse=True)
        waiting += [(folder / name, above | {identity}) for name in inside]


def visible_files(folder: Path) -> Iterator[str]:
    """Yield the name of each visible file directly in the folder, in the file system's order."""
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if is_visible_file(entry))


def is_visible_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry of a folder is a file, or a link to one, that is not hidden."""
    return not entry.name.startswith(".") and entry.is_file()


def _is_image_file(folder: Path, name: str) -> bool:
    return is_image_file(name, partial(_read_head, folder / name))


def _read_head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(HEAD_BYTES)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise SourceError for any OSError in the with-block."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{error.filename or path}: cannot be read: {error.strerror}; check the path") from error
