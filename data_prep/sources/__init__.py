"""Sources of images: folders, .tar archives of three kinds, WebDataset shards and parquet files."""

from __future__ import annotations

import os
from pathlib import Path

from fastbyol.data_prep.sources import webdataset
from fastbyol.data_prep.sources.base import Source, SourceError
from fastbyol.data_prep.sources.folder import FolderSource
from fastbyol.data_prep.sources.pattern import expand_pattern
from fastbyol.data_prep.sources.tar import (
    INNER_SUFFIX,
    NestedTarSource,
    TarSource,
    archive_errors,
    is_archive,
    iter_members,
    open_archive,
)
from fastbyol.data_prep.sources.webdataset import WebDatasetSource

KINDS = "a folder of images, a .tar of one, ILSVRC2012's tar of tars, WebDataset shards or parquet"
PARQUET_MAGIC = b"PAR1"


def open_source(path: str | os.PathLike[str], *, label_column: str | None = None) -> Source:
    """Open the source at a path or at the paths of a pattern; raise SourceError if there is none that can be read.

    `label_column` is the parquet column, or the .json key, of the labels, if it is not `label`.
    """
    path = Path(path)
    is_there = os.path.exists(path)  # noqa: PTH110 - Path.exists() raises if a pattern is too long for a name
    found = [path] if is_there else expand_pattern(os.fspath(path))
    if not found:
        raise SourceError(f"{path}: no such file or folder; give {KINDS}")
    folders = [each for each in found if each.is_dir()]
    if folders and len(found) > 1:
        raise SourceError(
            f"{path}: the pattern matches the folder {folders[0]}; give a pattern of .tar shards or parquet files"
        )
    if folders:
        inside = sorted(path.glob("*.parquet"))
        return (
            _open_parquet(path, inside, label_column) if inside else _without_columns(FolderSource(path), label_column)
        )
    kinds = {_is_parquet(each) for each in found}
    if len(kinds) > 1:
        raise SourceError(f"{path}: matches both parquet and other files; give one kind")
    if kinds == {True}:
        return _open_parquet(path, found, label_column)
    for each in found:
        with archive_errors(each):
            if not is_archive(each):
                raise SourceError(f"{each}: neither a folder, nor a tar archive, nor parquet; give {KINDS}")
    if len(found) > 1 or found != [path] or webdataset.is_shard(path):
        return WebDatasetSource(path, found, label_column=label_column)
    nested_or_plain: Source = NestedTarSource(path) if _is_nested(path) else TarSource(path)
    return _without_columns(nested_or_plain, label_column)


def _without_columns(source: Source, label_column: str | None) -> Source:
    """Return a source without columns; raise SourceError if a label column is asked for."""
    if label_column:
        raise SourceError(f"{source.path}: has no columns, but --label-column {label_column} is given; leave it out")
    return source


def _open_parquet(path: Path, found: list[Path], label_column: str | None) -> Source:
    """Open parquet files; raise SourceError if pyarrow is not installed."""
    try:
        from fastbyol.data_prep.sources.parquet import ParquetSource, require_one_split  # noqa: PLC0415 - an extra
    except ImportError as error:
        wanted = "install pyarrow: pip install 'fastbyol[parquet]'"
        raise SourceError(f"{path}: parquet cannot be read here ({error}); {wanted}") from error
    return ParquetSource(path, require_one_split(path, found), label_column=label_column)


def _is_parquet(path: Path) -> bool:
    with archive_errors(path), path.open("rb") as stream:
        return stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def _is_nested(path: Path) -> bool:
    """Return whether the first file of a .tar is a .tar."""
    with archive_errors(path), open_archive(path) as archive:
        for _, name in iter_members(archive, path):
            if name is not None:
                return name.suffix == INNER_SUFFIX
    return False
