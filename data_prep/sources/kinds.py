"""Kinds of sources, told by what lies at a path: the names in a folder, the first bytes of a file."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fastbyol.data_prep.sources import cifar, idx, listing
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.classes import SPLITS
from fastbyol.data_prep.sources.pattern import expand_pattern
from fastbyol.data_prep.sources.saved import files_of_saved
from fastbyol.data_prep.sources.tar import archive_errors, is_archive

KNOWN = (
    "a folder of images, a .tar or .zip of one, ILSVRC2012's tar of tars, WebDataset shards, parquet, arrow, a list, "
    "or the files of CIFAR or MNIST"
)
TABLES = ("parquet", "arrow")
STARTS = {"parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
HEAD_BYTES = 6
NUMBERED = re.compile(r"(.+?)-\d+-of-\d+(-.*)?\.\w+")  # of the files of a split


def find_source(path: Path, files: list[Path] | None = None) -> tuple[str, list[Path]]:
    """Return the kind of the source at a path or at the paths of a pattern, and its files.

    files: those of the pattern, if they are known. Raises SourceError if there is none. A folder of tables, or of
    shards, is of their kind.
    """
    found = find_files(path) if files is None else files
    if found == [path] and path.is_dir():
        saved = files_of_saved(path)
        if saved is not None:
            return "arrow", saved
        if cifar.version_of(path):
            return "cifar", found
        found = _tables_or_shards(path)
        if not found:
            return "folder", [path]
    elif folders := [each for each in found if each.is_dir()]:
        raise SourceError(
            f"{path}: the pattern matches the folder {folders[0]}; give a pattern of .tar shards or of tables"
        )
    kinds = {_kind_of_table(each) for each in found}
    if len(kinds) > 1:
        raise SourceError(f"{path}: matches both {' and '.join(sorted(kinds))} files; give one kind")
    kind = kinds.pop()
    if kind in TABLES:
        _require_one_split(path, found)
        return kind, found
    return (_kind_of_file(path) if found == [path] else _shards(found)), found


def find_files(path: Path) -> list[Path]:
    """List the file or folder at the path, or those of the pattern; raise SourceError if there is none."""
    is_there = os.path.exists(path)  # noqa: PTH110 - Path.exists() raises if a pattern is too long for a name
    found = [path] if is_there else expand_pattern(os.fspath(path))
    if not found:
        raise SourceError(f"{path}: no such file or folder; give {KNOWN}")
    return found


def _tables_or_shards(folder: Path) -> list[Path]:
    """List a folder's tables, or its shards where a table beside each only describes it, as of img2dataset."""
    parquet, arrow, shards = (  # but for hidden ones, such as macOS writes beside others
        sorted(path for path in folder.glob(f"*.{suffix}") if not path.name.startswith("."))
        for suffix in ("parquet", "arrow", "tar")
    )
    tables = parquet + arrow
    is_described = bool(tables) and {table.stem for table in tables} <= {shard.stem for shard in shards}
    return shards if is_described else tables


def _kind_of_table(path: Path) -> str:
    """Return which kind of table a file is, "other" if none."""
    with archive_errors(path), path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return next((kind for kind, starts in STARTS.items() if head.startswith(starts)), "other")


def _require_one_split(path: Path, files: Sequence[Path]) -> None:
    """Raise SourceError if tables are of several splits, which the hub and its library keep in one folder."""
    split_of = {split: file for file in reversed(files) if (split := _split(file)) is not None}
    if len(split_of) > 1:
        split, file = min(split_of.items())
        place = f"'{file.parent / split}-*{file.suffix}'" if NUMBERED.fullmatch(file.name) else str(file)
        raise SourceError(f"{path}: holds the splits {', '.join(sorted(split_of))}; give one of them, as in {place}")


def _split(file: Path) -> str | None:
    """Return the split that is in a name such as train-00000-of-00002.parquet, train.parquet or cifar10-train.arrow."""
    if match := NUMBERED.fullmatch(file.name):
        return match[1]
    last = re.split(r"[-_.]", file.stem)[-1]
    return last if last.lower() in SPLITS else None


def _kind_of_file(path: Path) -> str:
    """Return the kind of one file that is no table."""
    if listing.is_list(path):
        return "list"
    if cifar.is_pickle(path):
        return "cifar"
    if idx.is_idx(path):
        return "idx"
    if _is_zip(path):
        return "zip"
    _require_archive(path)
    return "tar"


def _is_zip(path: Path) -> bool:
    """Return whether a file begins and ends as a .zip; a .tar may end as the .zip that is its last member."""
    with archive_errors(path), path.open("rb") as stream:
        return stream.read(2) == b"PK" and zipfile.is_zipfile(path)


def _shards(files: Sequence[Path]) -> str:
    for each in files:
        _require_archive(each)
    return "shards"


def _require_archive(path: Path) -> None:
    with archive_errors(path):
        if not is_archive(path):
            raise SourceError(f"{path}: neither a folder, nor a .tar, .zip, table or list of files; give {KNOWN}")
