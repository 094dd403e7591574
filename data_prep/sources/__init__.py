"""Sources of images: folders, archives, WebDataset shards, tables, lists, and the files of CIFAR and MNIST."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastbyol.data_prep.sources import cifar, idx, listing, webdataset
from fastbyol.data_prep.sources.base import Source, SourceError
from fastbyol.data_prep.sources.classes import Labels
from fastbyol.data_prep.sources.folder import FolderSource
from fastbyol.data_prep.sources.kinds import TABLES, find_files, find_source
from fastbyol.data_prep.sources.labels import UnlabelledSource
from fastbyol.data_prep.sources.saved import features_of_saved
from fastbyol.data_prep.sources.tar import NestedTarSource, TarSource, is_nested
from fastbyol.data_prep.sources.webdataset import ImagesOfShards, WebDatasetSource
from fastbyol.data_prep.sources.zip import ZipSource

LABELS, LABEL_COLUMN, IMAGE_KEY = "--labels", "--label-column", "--image-key"
NAMES_AND_FLAGS = {  # what a kind is called, and the flags it has a use for beside --labels none
    "folder": ("a folder of images", [LABELS]),
    "zip": ("a .zip", [LABELS]),
    "tar": ("a .tar of folders", [LABELS]),
    "nested": ("a .tar of .tar files", []),
    "shards": ("WebDataset shards", [LABEL_COLUMN, IMAGE_KEY]),
    "parquet": ("parquet", [LABEL_COLUMN]),
    "arrow": ("arrow", [LABEL_COLUMN]),
    "list": ("a list of files", [LABEL_COLUMN]),
    "cifar": ("CIFAR", [LABEL_COLUMN]),
    "idx": ("an idx file", []),
}


def open_source(
    path: str | os.PathLike[str],
    *,
    labels: Labels = "auto",
    label_column: str | None = None,
    image_key: str | None = None,
    files: list[Path] | None = None,
    root: Path | None = None,
) -> Source:
    """Open the source at a path or at the paths of a pattern; raise SourceError if there is none that can be read.

    labels: which folders are classes, see classes.group_by_class; "none" for any source without its labels.
    label_column: the column of a table, the .json key, the suffix of the file, or CIFAR's key that holds the labels, if
    it is not the usual one. image_key: the suffix of the image, where samples of WebDataset shards have several.
    files: those of the pattern, where they are known. root: the folder that the images which a table names have to lie
    in, None for any.
    """
    path = Path(path)
    kind, files = find_source(path, files)
    if kind == "tar":
        kind = _kind_of_tar(path, image_key)
    of_folders = labels if labels in ("top", "parent") else None
    _refuse(path, kind, {LABELS: of_folders, LABEL_COLUMN: label_column, IMAGE_KEY: image_key})
    has_labels = labels != "none"
    source: Source
    match kind:
        case "folder":
            source = FolderSource(path, labels=labels)
        case "zip":
            source = ZipSource(path, labels=labels)
        case "tar":
            source = TarSource(path, labels=labels)
            if labels == "auto" and source.class_names is None and source.ignored[".cls"]:
                source = WebDatasetSource(path, files)  # which finds the labels, or says why not
        case "nested":
            source = NestedTarSource(path)
        case "shards" if not has_labels and image_key is None:
            source = ImagesOfShards(path, files)
        case "shards":
            source = WebDatasetSource(path, files, label_column=label_column, image_key=image_key)
        case "list":
            source = listing.ListSource(path, label_column=label_column)
        case "cifar":
            source = cifar.CifarSource(path, label_column=label_column, has_labels=has_labels)
        case "idx":
            source = idx.IdxSource(path, has_labels=has_labels)
        case _:
            features = features_of_saved(path)
            source = _tables(path).TableSource(
                path, files, kind, label_column=label_column, has_labels=has_labels, features=features, root=root
            )
    return source if has_labels or source.class_names is None else UnlabelledSource(source)


def files_of(path: Path) -> Iterator[Path]:
    """Yield the files and folders that decide what a source holds; raise SourceError for what is no source."""
    yield from find_files(path)
    kind, files = find_source(path)
    if kind == "list":
        yield from (path.parent / entry.path for entry in listing.read_list(path))
    elif kind in TABLES:
        yield from _tables(path).listed_files(files, kind)
    beside = None
    if kind == "cifar" and not path.is_dir():
        beside = cifar.meta_beside(path)
    elif kind == "idx":
        beside = idx.labels_beside(path)
    if beside is not None:
        yield beside


def names_beside(name: str) -> list[str]:
    """Return the names of files that belong to a source that is a file of that name, if they lie beside it."""
    of_cifar = [each.meta for each in cifar.VERSIONS if name in (*each.training, each.test)]
    return of_cifar or (idx.names_of_labels(name) if "idx3" in name else [])


def _kind_of_tar(path: Path, image_key: str | None) -> str:
    """Return the kind of one .tar, which the names of its files tell."""
    if cifar.version_of(path):
        return "cifar"
    if image_key or webdataset.is_shard(path):
        return "shards"
    return "nested" if is_nested(path) else "tar"


def _refuse(path: Path, kind: str, flags: dict[str, str | None]) -> None:
    """Raise SourceError if a flag is given that this kind of source has no use for."""
    what, used = NAMES_AND_FLAGS[kind]
    for flag, value in flags.items():
        if value is not None and flag not in used:
            raise SourceError(f"{path}: {flag} {value} is given, which {what} has no use for; leave it out")


def _tables(path: Path) -> ModuleType:
    """Return the module that reads tables; raise SourceError if pyarrow is not installed, or cannot be imported."""
    try:
        from fastbyol.data_prep.sources import tables  # noqa: PLC0415 - an extra
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError)
        wanted = (
            "install pyarrow: pip install 'fastbyol[parquet]'"
            if is_missing
            else "pyarrow is installed: mend what its import lacks"
        )
        raise SourceError(f"{path}: tables cannot be read here ({error}); {wanted}") from error
    return tables
