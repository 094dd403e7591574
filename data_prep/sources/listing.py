"""Lists of images: a source of the files in a .txt or .csv, and the labels that such a list gives to another source."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastbyol.data_prep.sources.base import Sample, Source, SourceError, listing_progress
from fastbyol.data_prep.sources.labels import LabelCounter, label_index

SUFFIXES = (".txt", ".csv", ".tsv")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "name")
LABEL_COLUMNS = ("label", "class", "target")
LINE_MAX = 1 << 16  # characters


class Entry(NamedTuple):
    """A line of a list: a path, and the number or name of a class."""

    path: str
    label: int | str | None


def is_list(path: Path) -> bool:
    """Return whether a file's name is that of a list."""
    return path.suffix.lower() in SUFFIXES


def read_list(path: Path, *, label_column: str | None = None) -> Iterator[Entry]:
    """Yield the entries of a list, in its order; raise SourceError for what is none.

    A .csv, or .tsv with tabs, begins with the names of its columns: a path column is named as in PATH_COLUMNS, one of
    labels `label_column` or as in LABEL_COLUMNS. A line of a .txt is a path, or a path and a label behind the last
    space or tab; if the first line is a file as a whole, so are all.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _rows(path, file, label_column) if path.suffix.lower() != ".txt" else _lines(path, file)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except csv.Error as error:
        raise SourceError(f"{path}: not a table: {error}") from error


def _rows(path: Path, file: Iterator[str], label_column: str | None) -> Iterator[Entry]:
    table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    columns = table.fieldnames or []
    of_path = next((name for name in PATH_COLUMNS if name in columns), None)
    if of_path is None:
        raise SourceError(f"{path}: columns are {', '.join(columns)}; name that of the files {PATH_COLUMNS[0]!r}")
    if label_column is not None and label_column not in columns:
        raise SourceError(f"{path}: no column {label_column!r}; give one of {', '.join(columns)}")
    of_label = label_column or next((name for name in LABEL_COLUMNS if name in columns), None)
    for row in table:
        if row[of_path]:
            yield Entry(row[of_path], _label(row[of_label]) if of_label else None)


def _lines(path: Path, file: Iterator[str]) -> Iterator[Entry]:
    has_labels: bool | None = None
    for line in file:
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if "\0" in text:
            raise SourceError(f"{path}: not a list in UTF-8; wanted a path a line")
        if len(text) > LINE_MAX:
            raise SourceError(f"{path}: a line of {len(text)} characters; wanted a path a line")
        words = text.split()
        if has_labels is None and len(words) > 1:
            has_labels = not (path.parent / text).is_file()
        if len(words) == 1:
            yield Entry(words[0], None)
        elif has_labels:
            name, label = text.rsplit(None, 1)
            yield Entry(name, _label(label))
        else:
            yield Entry(text, None)


def _label(text: str | None) -> int | str | None:
    stripped = (text or "").strip()
    return int(stripped) if stripped.removeprefix("-").isdecimal() and len(stripped) < 20 else stripped or None


class ListSource:
    """The images whose paths a list holds, relative to the list's folder; a file that is missing raises SourceError."""

    def __init__(self, path: Path, *, label_column: str | None = None) -> None:
        self.path = path
        self._label_column = label_column
        self.count, self.ignored = 0, Counter[str]()
        labels = LabelCounter(path)
        for entry in listing_progress(read_list(path, label_column=label_column)):
            self.count += 1
            if not (path.parent / entry.path).is_file():
                raise SourceError(
                    f"{path}: {entry.path} does not exist; paths are relative to {path.absolute().parent}"
                )
            labels.add(entry.label, entry.path)
        if not self.count:
            raise SourceError(f"{path}: an empty list; wanted a path a line")
        self.class_names, self.class_counts = labels.classes()

    def __iter__(self) -> Iterator[Sample]:
        known = label_index(self.class_names)
        for entry in read_list(self.path, label_column=self._label_column):
            yield Sample(entry.path, known.get(entry.label), self.path.parent / entry.path)


class ListedLabels:
    """A source with the labels that a list gives its images: by their whole names, or else by the last parts of both.

    A last part, with or without its suffix, counts where one line alone has it.
    """

    def __init__(self, source: Source, listed: Path, *, label_column: str | None = None) -> None:
        self._source, self._listed = source, listed
        self.path, self.count, self.ignored = source.path, source.count, source.ignored
        self._label_of: dict[str, int | str | None] = {}
        by_last_part: dict[str, list[int | str | None]] = {}
        for entry in read_list(listed, label_column=label_column):
            if self._label_of.setdefault(entry.path, entry.label) != entry.label:
                raise SourceError(f"{listed}: {entry.path} has two labels; remove one")
            last = PurePosixPath(entry.path)
            for key in {last.name, last.stem}:
                by_last_part.setdefault(key, []).append(entry.label)
        self._label_of_last_part = {key: found[0] for key, found in by_last_part.items() if len(found) == 1}
        labels = LabelCounter(listed)
        for sample in listing_progress(source):
            labels.add(self._find(sample.name), sample.name)
        self.class_names, self.class_counts = labels.classes()
        if self.class_names is None:
            raise SourceError(f"{listed}: has no labels; wanted NAME LABEL a line, or a table with a column 'label'")

    def _find(self, name: str) -> int | str | None:
        if name in self._label_of:
            return self._label_of[name]
        last = PurePosixPath(name)
        for key in (last.name, last.stem):
            if key in self._label_of_last_part:
                return self._label_of_last_part[key]
        raise SourceError(
            f"{self._listed}: has no line for {name} of {self.path}; add it, without a label if it has none"
        )

    def __iter__(self) -> Iterator[Sample]:
        known = label_index(self.class_names)
        for sample in self._source:
            yield replace(sample, label=known.get(self._find(sample.name)))
