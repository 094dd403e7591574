"""A source that reads parquet files as on the Hugging Face hub: a column of image bytes and one of labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastbyol.data_prep.sources.base import Sample, SourceError, listing_progress
from fastbyol.data_prep.sources.labels import LabelCounter, label_index

IMAGE_NAMES = ("image", "img")  # preferred where several columns hold bytes
LABEL_NAME = "label"
BYTES_FIELD = "bytes"
ROWS_PER_READ = 16  # images of up to some megabytes each
LABELS_PER_READ = 1 << 16
BUFFER_BYTES = 1 << 20  # columns are read in pieces: a row group may be larger than memory
SPLIT = re.compile(r"(.+?)-\d+-of-\d+(-.*)?\.parquet")


class _Columns(NamedTuple):
    """The columns to read; `declared` are the class names of the label, if the schema has them."""

    image: str  # ends in ".bytes" if it is a struct
    label: str | None
    declared: list[str] | None


class ParquetSource:
    """Images in parquet files, in the order of files and rows; paths in the files are never followed."""

    def __init__(
        self, path: Path, files: list[Path], *, label_column: str | None = None, has_labels: bool = True
    ) -> None:
        self.path = path
        self._files = files
        self.ignored = Counter[str]()
        self.count = 0
        self._columns: _Columns | None = None
        for file in files:
            with _open(file) as table:
                columns = _columns(file, table.schema_arrow, label_column, has_labels=has_labels)
                self.count += table.metadata.num_rows
            if self._columns not in (None, columns):
                raise SourceError(
                    f"{file}: its columns or class names differ from those of {files[0]}; give files of one data set"
                )
            self._columns = columns
        if self._columns is None or not self.count:
            raise SourceError(f"{path}: no rows in {len(files)} parquet files; give files with images")
        labels = LabelCounter(path, self._columns.declared)
        for sample, label, count in listing_progress(self._labels(), " row batches"):
            labels.add(label, sample, count=count)
        self.class_names, self.class_counts = labels.classes()

    def _labels(self) -> Iterator[tuple[str, object, int]]:
        """Yield (sample, label, count) for each label value in each batch of rows."""
        assert self._columns is not None
        if self._columns.label is None:
            return
        for file in self._files:
            with _open(file) as table:
                for batch in table.iter_batches(LABELS_PER_READ, columns=[self._columns.label], use_threads=False):
                    for found in pc.value_counts(batch.column(0)).to_pylist():
                        yield f"a row of {file.name}", found["values"], found["counts"]

    def __iter__(self) -> Iterator[Sample]:
        assert self._columns is not None
        known = label_index(self.class_names)
        columns = [self._columns.image] + ([self._columns.label] if self._columns.label else [])
        for file in self._files:
            row = 0
            with _open(file) as table:
                for batch in table.iter_batches(ROWS_PER_READ, columns=columns, use_threads=False):
                    images = batch.column(self._columns.image.removesuffix(f".{BYTES_FIELD}"))
                    images = images.flatten()[0] if pa.types.is_struct(images.type) else images
                    labels = batch.column(self._columns.label) if self._columns.label else [None] * len(images)
                    for image, label in zip(images, labels, strict=True):
                        value = None if label is None else label.as_py()
                        yield Sample(f"{file.name} row {row}", known.get(value), image.as_py() or b"")
                        row += 1


def require_one_split(folder: Path, files: list[Path]) -> list[Path]:
    """Return the files; raise SourceError if they are of several splits, which the hub keeps in one folder."""
    splits = sorted({match[1] for file in files if (match := SPLIT.fullmatch(file.name))})
    if len(splits) > 1:
        raise SourceError(
            f"{folder}: holds the splits {', '.join(splits)}; give one of them, as in '{folder / splits[0]}-*.parquet'"
        )
    return files


def _columns(file: Path, schema: Any, label_column: str | None, *, has_labels: bool) -> _Columns:
    """Choose the columns of images and, if they are wanted, of labels."""
    features = _features(schema)
    declared = {name: facts["names"] for name, facts in features.items() if facts.get("_type") == "ClassLabel"}
    label = _label(file, schema, declared, label_column) if has_labels else None
    return _Columns(_image(file, schema), label, declared.get(label) if label else None)


def _image(file: Path, schema: Any) -> str:
    """Return the column of images: the only one with bytes, or else the one with a usual name."""
    structs = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type)
        and field.type.get_field_index(BYTES_FIELD) >= 0
        and _is_bytes(field.type.field(BYTES_FIELD).type)
    ]
    found = structs or [field.name for field in schema if _is_bytes(field.type)]
    choice = [name for name in IMAGE_NAMES if name in found][:1] or found
    if len(choice) != 1:
        came = ", ".join(choice or schema.names)
        wanted = "one of image bytes, or a struct with a field 'bytes'; name it 'image'"
        raise SourceError(f"{file}: columns are {came}; wanted {wanted}")
    return f"{choice[0]}.{BYTES_FIELD}" if structs else choice[0]


def _label(file: Path, schema: Any, declared: dict[str, list[str]], asked: str | None) -> str | None:
    """Return the column of labels: the one asked for, `label`, or the only one in the schema; None if there is none."""
    candidates = [asked] if asked else [LABEL_NAME] if LABEL_NAME in schema.names else sorted(declared)
    if len(candidates) > 1:
        raise SourceError(
            f"{file}: label columns are {', '.join(candidates)}; name one with --label-column, or give --labels none"
        )
    if not candidates:
        return None
    if candidates[0] not in schema.names:
        raise SourceError(f"{file}: no column {candidates[0]!r}; give one of {', '.join(schema.names)}")
    of = schema.field(candidates[0]).type
    if not (pa.types.is_integer(of) or pa.types.is_string(of) or pa.types.is_large_string(of)):
        raise SourceError(f"{file}: label column {candidates[0]!r} holds {of}; wanted whole numbers or names")
    return candidates[0]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the column metadata of Hugging Face's datasets library; {} if there is none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    named = {name: facts for name, facts in features.items() if isinstance(facts, dict)}
    return {
        name: facts
        for name, facts in named.items()
        if facts.get("_type") != "ClassLabel" or isinstance(facts.get("names"), list)
    }


def _is_bytes(of: Any) -> bool:
    return bool(pa.types.is_binary(of) or pa.types.is_large_binary(of) or pa.types.is_binary_view(of))


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open one parquet file; raise SourceError for any error in the with-block."""
    try:
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file}: cannot be read as parquet: {error}; copy it again") from error
