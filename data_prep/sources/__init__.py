"""Sources of images: folders, .tar archives of three kinds, .zip, WebDataset shards, parquet files and lists."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from fastbyol.data_prep.sources import listing, webdataset
from fastbyol.data_prep.sources.base import Source, SourceError
from fastbyol.data_prep.sources.classes import Labels
from fastbyol.data_prep.sources.folder import FolderSource
from fastbyol.data_prep.sources.labels import UnlabelledSource
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
from fastbyol.data_prep.sources.webdataset import ImagesOfShards, WebDatasetSource
from fastbyol.data_prep.sources.zip import ZipSource

KINDS = "a folder of images, a .tar or .zip of one, ILSVRC2012's tar of tars, WebDataset shards, parquet or a list"
PARQUET_MAGIC = b"PAR1"


def open_source(
    path: str | os.PathLike[str],
    *,
    labels: Labels = "auto",
    label_column: str | None = None,
    image_key: str | None = None,
) -> Source:
    """Open the source at a path or at the paths of a pattern; raise SourceError if there is none that can be read.

    labels: which folders are classes, see classes.group_by_class; "none" for any source without its labels.
    label_column: the parquet column, the .json key or the suffix of the file that holds the labels, if it is not the
    usual one. image_key: the suffix of the image, where samples of WebDataset shards have several.
    """
    path = Path(path)
    found = find_files(path)
    wanted = {"--label-column": label_column, "--image-key": image_key}
    if found == [path] and path.is_dir():
        found = _table_or_shards(path)
        if not found:
            _refuse(path, "a folder of images", wanted)
            return FolderSource(path, labels=labels)
    elif folders := [each for each in found if each.is_dir()]:
        raise SourceError(
            f"{path}: the pattern matches the folder {folders[0]}; give a pattern of .tar shards or parquet files"
        )
    kinds = {_is_parquet(each) for each in found}
    if len(kinds) > 1:
        raise SourceError(f"{path}: matches both parquet and other files; give one kind")
    if kinds == {True}:
        _refuse(path, "parquet", {"--image-key": image_key, "--labels": _of_folders(labels)})
        return _open_parquet(path, found, label_column, has_labels=labels != "none")
    if found == [path] and listing.is_list(path):
        _refuse(path, "a list of files", {"--image-key": image_key, "--labels": _of_folders(labels)})
        listed = listing.ListSource(path, label_column=label_column)
        return UnlabelledSource(listed) if labels == "none" else listed
    if found == [path] and _is_zip(path):
        _refuse(path, "a .zip", wanted)
        return ZipSource(path, labels=labels)
    for each in found:
        with archive_errors(each):
            if not is_archive(each):
                raise SourceError(f"{each}: neither a folder, nor a .tar, .zip, parquet or list of files; give {KINDS}")
    if len(found) > 1 or found != [path] or image_key or webdataset.is_shard(path):
        return _open_shards(path, found, labels, wanted)
    if _is_nested(path):
        _refuse(path, "a .tar of .tar files", wanted | {"--labels": _of_folders(labels)})
        nested = NestedTarSource(path)
        return UnlabelledSource(nested) if labels == "none" else nested
    _refuse(path, "a .tar of folders", wanted)
    source = TarSource(path, labels=labels)
    if labels == "auto" and source.class_names is None and source.ignored[".cls"]:
        return _open_shards(path, found, labels, wanted)  # which finds the labels, or says why not
    return source


def find_files(path: Path) -> list[Path]:
    """List the file or folder at the path, or those of the pattern; raise SourceError if there is none."""
    is_there = os.path.exists(path)  # noqa: PTH110 - Path.exists() raises if a pattern is too long for a name
    found = [path] if is_there else expand_pattern(os.fspath(path))
    if not found:
        raise SourceError(f"{path}: no such file or folder; give {KINDS}")
    return found


def _table_or_shards(folder: Path) -> list[Path]:
    """List a folder's parquet files, or its shards where a table beside each only describes it, as of img2dataset."""
    tables, shards = (sorted(folder.glob(f"*.{suffix}")) for suffix in ("parquet", "tar"))
    is_described = bool(tables) and {table.stem for table in tables} <= {shard.stem for shard in shards}
    return shards if is_described else tables


def _open_shards(path: Path, found: list[Path], labels: Labels, wanted: dict[str, str | None]) -> Source:
    if labels == "none" and wanted["--image-key"] is None:
        return ImagesOfShards(path, found)
    _refuse(path, "WebDataset shards", {"--labels": _of_folders(labels)})
    shards = WebDatasetSource(path, found, label_column=wanted["--label-column"], image_key=wanted["--image-key"])
    return UnlabelledSource(shards) if labels == "none" else shards


def _of_folders(labels: Labels) -> str | None:
    return labels if labels in ("top", "parent") else None


def _refuse(path: Path, what: str, flags: dict[str, str | None]) -> None:
    """Raise SourceError if a flag is given that this kind of source has no use for."""
    for flag, value in flags.items():
        if value is not None:
            raise SourceError(f"{path}: {flag} {value} is given, which {what} has no use for; leave it out")


def _open_parquet(path: Path, found: list[Path], label_column: str | None, *, has_labels: bool) -> Source:
    """Open parquet files; raise SourceError if pyarrow is not installed."""
    try:
        from fastbyol.data_prep.sources.parquet import ParquetSource, require_one_split  # noqa: PLC0415 - an extra
    except ImportError as error:
        wanted = "install pyarrow: pip install 'fastbyol[parquet]'"
        raise SourceError(f"{path}: parquet cannot be read here ({error}); {wanted}") from error
    return ParquetSource(path, require_one_split(path, found), label_column=label_column, has_labels=has_labels)


def _is_parquet(path: Path) -> bool:
    with archive_errors(path), path.open("rb") as stream:
        return stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def _is_zip(path: Path) -> bool:
    """Return whether a file begins and ends as a .zip; a .tar may end as the .zip that is its last member."""
    with archive_errors(path), path.open("rb") as stream:
        return stream.read(2) == b"PK" and zipfile.is_zipfile(path)


def _is_nested(path: Path) -> bool:
    """Return whether the first file of a .tar is a .tar."""
    with archive_errors(path), open_archive(path) as archive:
        for _, name in iter_members(archive, path):
            if name is not None:
                return name.suffix == INNER_SUFFIX
    return False
