"""A source that reads a folder of images: one folder per class, or one flat folder without labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbyol.data_prep.sources.base import SUFFIXES, Sample, SourceError, is_image, listing_progress


class FolderSource:
    """Images in FOLDER/CLASS/, or in FOLDER/ without labels; files and class folders may be symbolic links."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _readable(path):
            folders = sorted(e.name for e in os.scandir(path) if not e.name.startswith(".") and e.is_dir())
            found = dict.fromkeys(["", *folders], 0)
            self.ignored = 0
            for folder, name in listing_progress(_walk(path, found)):
                found[folder] += is_image(name)
                self.ignored += not is_image(name)
        self.count = sum(found.values())
        flat = found.pop("")
        counts = {folder: count for folder, count in found.items() if count}
        if flat and counts:
            raise SourceError(
                f"{path}: {flat} images lie beside class folders such as {next(iter(counts))}; keep only one of the two"
            )
        if not self.count:
            raise SourceError(f"{path}: no images in it or in class folders; {self._advice()}")
        self.class_names = list(counts) or None
        self.class_counts = list(counts.values()) or None

    def __iter__(self) -> Iterator[Sample]:
        with _readable(self.path):
            for label, folder in enumerate(self.class_names or [""]):
                known = None if self.class_names is None else label
                for name in sorted(name for _, name in listing_progress(_walk(self.path, [folder])) if is_image(name)):
                    yield Sample(f"{folder}/{name}" if folder else name, known, self.path / folder / name)

    def _advice(self) -> str:
        """Suggest a path from what the folder holds instead: images deeper down, archives or parquet files."""
        for folder, folders, names in os.walk(self.path):
            folders.sort()
            if any(map(is_image, names)):
                return f"images lie deeper: give {Path(folder).parent} instead"
            if tars := sorted(name for name in names if name.endswith(".tar")):
                return (
                    f"{len(tars)} archives such as {tars[0]} lie in {folder}: give one of them, or a quoted pattern "
                    f"such as '{folder}/*.tar' for WebDataset shards"
                )
            if any(name.endswith(".parquet") for name in names):
                return f"parquet files lie deeper: give {folder} instead"
        return f"known suffixes are {' '.join(sorted(SUFFIXES))}"


def _walk(path: Path, folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (folder, name) of each visible file directly in the folders, in the file system's order."""
    for folder in folders:
        with os.scandir(path / folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file():
                    yield folder, entry.name


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise SourceError for any OSError in the with-block."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{error.filename or path}: cannot be read: {error.strerror}; check the path") from error
