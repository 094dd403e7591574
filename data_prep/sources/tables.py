"""A source that reads tables, parquet or arrow, as on the Hugging Face hub: a column of images and one of labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc

from fastbyol.data_prep.sources.arrow import open_arrow
from fastbyol.data_prep.sources.base import Sample, SourceError, listing_progress
from fastbyol.data_prep.sources.columns import Column, Columns, array_of, choose_columns
from fastbyol.data_prep.sources.labels import LabelCounter, label_index
from fastbyol.data_prep.sources.parquet import open_parquet

ROWS_PER_READ = 16  # images of up to some megabytes each
LABELS_PER_READ = 1 << 16


class Table(Protocol):
    """An open file of a table; `count` is the number of its rows."""

    schema: Any
    count: int

    def may_lack(self, column: Column) -> bool:
        """Return whether a column may have rows without a value."""

    def batches(self, columns: Sequence[Column], rows: int) -> Iterator[Any]:
        """Yield record batches of up to so many rows, with these columns."""


Opener = Callable[[Path], AbstractContextManager[Table]]
OPENERS: dict[str, Opener] = {"parquet": open_parquet, "arrow": open_arrow}


class TableSource:
    """Images in tables, in the order of files and rows.

    An image is its bytes in the table or, where that has none, the file at a path, relative to the table's folder. A
    file that is missing is a bad image, as is one outside the root, if there is one.
    """

    def __init__(
        self,
        path: Path,
        files: list[Path],
        kind: str,
        *,
        label_column: str | None = None,
        has_labels: bool = True,
        features: Mapping[str, Any] | None = None,
        root: Path | None = None,
    ) -> None:
        """Take files of one kind of OPENERS; features: those that the datasets library notes beside them."""
        self.path, self._root = path, root
        self._files, self._open = files, OPENERS[kind]
        self.ignored = Counter[str]()
        self.count = 0
        columns: Columns | None = None
        for file in files:
            with self._open(file) as table:
                chosen = choose_columns(
                    file, table.schema, label_column, features=features or {}, has_labels=has_labels
                )
                self.count += table.count
            if columns not in (None, chosen):
                raise SourceError(
                    f"{file}: its columns or class names differ from those of {files[0]}; give files of one data set"
                )
            columns = chosen
        if columns is None or not self.count:
            raise SourceError(f"{path}: no rows in {len(files)} {kind} files; give files with images")
        self._columns = columns
        labels = LabelCounter(path, columns.declared)
        for sample, label, count in listing_progress(self._labels(), " row batches"):
            labels.add(label, sample, count=count)
        self.class_names, self.class_counts = labels.classes()

    def _labels(self) -> Iterator[tuple[str, object, int]]:
        """Yield (sample, label, count) for each label value in each batch of rows."""
        if not self._columns.label:
            return
        for file in self._files:
            with self._open(file) as table:
                for batch in table.batches([self._columns.label], LABELS_PER_READ):
                    for found in pc.value_counts(batch.column(0)).to_pylist():
                        yield f"a row of {file.name}", found["values"], found["counts"]

    def __iter__(self) -> Iterator[Sample]:
        known = label_index(self.class_names)
        for file in self._files:
            row = 0
            with self._open(file) as table:
                for batch in table.batches(self._columns.used, ROWS_PER_READ):
                    columns = (self._columns.data, self._columns.path, self._columns.label)
                    for data, place, label in zip(*(_values(batch, column) for column in columns), strict=True):
                        if data is None and place and "\0" not in place:
                            yield Sample(place, known.get(label), file.parent / place, self._root)
                        else:
                            yield Sample(f"{file.name} row {row}", known.get(label), data or b"")
                        row += 1


def listed_files(files: Iterable[Path], kind: str) -> Iterator[Path]:
    """Yield the files that are there of those that tables name, but for tables that hold the bytes of all images."""
    for file in files:
        with OPENERS[kind](file) as table:
            columns = choose_columns(file, table.schema, None, features={}, has_labels=False)
            if not columns.path or (columns.data and not table.may_lack(columns.data)):
                continue
            for batch in table.batches([columns.path], LABELS_PER_READ):
                places = (file.parent / place for place in _values(batch, columns.path) if place)
                yield from (place for place in places if os.path.isfile(place))  # noqa: PTH113 - Path's raises for long names


def _values(batch: Any, column: Column) -> Iterator[Any]:
    """Yield the values of a column as Python has them; None in each row where there is no column."""
    if column:
        return (value.as_py() for value in array_of(batch, column))
    return repeat(None, batch.num_rows)
