"""A source that reads CIFAR-10 and CIFAR-100 as downloaded for Python: the folder, its archive, or one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.data_prep.formats import kind_of
from fastbyol.data_prep.sources.base import FILE_BYTES_MAX, Sample, SourceError, read_file
from fastbyol.data_prep.sources.folder import readable, visible_files
from fastbyol.data_prep.sources.labels import LabelCounter, label_index
from fastbyol.data_prep.sources.pickled import PICKLE, bytes_array, read_pickle
from fastbyol.data_prep.sources.tar import archive_errors, iter_members, open_archive, read_member

CHANNEL = 32 * 32  # bytes
HEADER = b"P6 32 32 255\n"  # of a PPM
LOOK_AT = 8  # files of an archive


class Version(NamedTuple):
    """The files of a version, and the key of the class names for each key of labels, the usual one first."""

    training: tuple[str, ...]
    test: str
    meta: str
    names_of: dict[str, str]


VERSIONS = (
    Version(
        tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta", {"labels": "label_names"}
    ),
    Version(("train",), "test", "meta", {"fine_labels": "fine_label_names", "coarse_labels": "coarse_label_names"}),
)


class _Batch(NamedTuple):
    """The images of a file: rows of 3072 bytes, channel by channel, and the name and label of each."""

    rows: NDArray[np.uint8]
    names: list[bytes]
    labels: list[int]


class CifarSource:
    """The training images of a folder or an archive, in its order, or the images of one file of such a folder.

    `label_column` is the key of the labels, for CIFAR-100 the fine ones if it is None. The class names lie in a file of
    their own, which nothing else needs. An image is handed on as a PPM, with its pixels as they are.
    """

    def __init__(self, path: Path, *, label_column: str | None = None, has_labels: bool = True) -> None:
        self.path = path
        whole = version_of(path) if path.is_dir() or not is_pickle(path) else None
        self._place = path if whole else path.parent
        self._version = whole or version_of_file(path)
        self._batches = self._version.training if whole else (path.name,)
        self._label = label_column or next(iter(self._version.names_of))
        if self._label not in self._version.names_of:
            labels = " or ".join(self._version.names_of)
            raise SourceError(f"{path}: no labels {label_column!r}; give {labels}, or leave out --label-column")
        self.ignored = Counter[str]()
        counts: dict[str, Counter[int]] = {}
        meta: dict[bytes, Any] = {}
        for name, data in _files(self._place, (*self._batches, self._version.meta), also_others=whole is not None):
            if data is None:
                self.ignored[self._kind(name)] += 1
            elif name in self._batches:
                counts[name] = Counter(self._read(name, data).labels)
            else:
                meta = read_pickle(data, self._place / name)
        self.count = sum(count.total() for count in counts.values())
        missing = [name for name in self._batches if name not in counts]
        if missing or not self.count:
            raise SourceError(f"{path}: holds no {' and no '.join(missing) or 'images'}; download it again")
        self.class_names: list[str] | None = None
        self.class_counts: list[int] | None = None
        if has_labels:
            self.class_names, self.class_counts = self._classes(meta, counts)

    def __iter__(self) -> Iterator[Sample]:
        known = label_index(self.class_names)
        for name, data in _files(self._place, self._batches):
            for row, image, label in zip(*self._read(name, data or b""), strict=True):
                pixels = row.reshape(3, CHANNEL).T.tobytes()
                yield Sample(f"{name}/{image.decode(errors='surrogateescape')}", known.get(label), HEADER + pixels)

    def _read(self, name: str, data: bytes) -> _Batch:
        """Return what a file of images holds; raise SourceError where its parts do not belong together."""
        place = self._place / name
        facts = read_pickle(data, place)
        rows = bytes_array(facts.get(b"data"))
        if rows is None or rows.shape[1] != 3 * CHANNEL:
            raise SourceError(f"{place}: no rows of {3 * CHANNEL} bytes in its 'data'; download it again")
        names, labels = facts.get(b"filenames"), facts.get(self._label.encode())
        for key, found, kind in (("filenames", names, bytes), (self._label, labels, int)):
            if not (isinstance(found, list) and len(found) == len(rows) and all(type(each) is kind for each in found)):
                raise SourceError(f"{place}: wanted {len(rows)} {key}, one an image; download it again")
        return _Batch(rows, names or [], labels or [])

    def _classes(
        self, meta: dict[bytes, Any], counts: dict[str, Counter[int]]
    ) -> tuple[list[str] | None, list[int] | None]:
        """Return the name and the number of images of each class."""
        place, key = self._place / self._version.meta, self._version.names_of[self._label]
        names = meta.get(key.encode())
        if not (isinstance(names, list) and all(isinstance(name, bytes) for name in names)):
            raise SourceError(f"{place}: no {key} in it, or it is not there; copy it there, or give --labels none")
        labels = LabelCounter(self.path, [name.decode(errors="surrogateescape") for name in names])
        for name, count in counts.items():
            for label, images in count.items():
                labels.add(label, f"an image of {name}", count=images)
        return labels.classes()

    def _kind(self, name: str) -> str:
        """Say what a file is that is passed over, and how to read the test images."""
        if name != self._version.test:
            return kind_of(name)
        return f"{name} (give {self.path / name} for it)" if self.path.is_dir() else f"{name} (unpack and give it)"


def version_of(path: Path) -> Version | None:
    """Return which CIFAR a folder or an archive holds, as the files in it tell; None if it holds neither."""
    if path.is_dir():
        found = (each for each in VERSIONS if is_pickle(path / each.meta) or is_pickle(path / each.training[0]))
        return next(found, None)
    of_name = {name: each for each in VERSIONS for name in (*each.training, each.test, each.meta)}
    with archive_errors(path), open_archive(path) as archive:
        for (member, name), _ in zip(iter_members(archive, path), range(LOOK_AT), strict=False):
            if name and name.name in of_name and read_member(archive, member, len(PICKLE)) == PICKLE:
                return of_name[name.name]
    return None


def meta_beside(path: Path) -> Path | None:
    """Return the file of class names that belongs to a file of images; None if it is not there."""
    found = path.parent / version_of_file(path).meta
    return found if found.is_file() else None


def version_of_file(path: Path) -> Version:
    """Return which CIFAR a file of images belongs to, as its labels tell."""
    with readable(path):
        facts = read_pickle(read_file(path), path)
    for version in VERSIONS:
        if any(key.encode() in facts for key in version.names_of):
            return version
    raise SourceError(f"{path}: a pickle without images of CIFAR; give their folder, or a file such as test_batch")


def is_pickle(path: Path) -> bool:
    """Return whether a file is there and begins as those of CIFAR do."""
    if not path.is_file():
        return False
    with readable(path), path.open("rb") as stream:
        return stream.read(len(PICKLE)) == PICKLE


def _files(place: Path, wanted: Collection[str], *, also_others: bool = False) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and content of the wanted files of a folder or an archive, and also the names of others, with None."""
    if place.is_dir():
        with readable(place):
            names = sorted(visible_files(place) if also_others else (n for n in wanted if (place / n).is_file()))
            for name in names:
                yield name, read_file(place / name) if name in wanted else None
        return
    with archive_errors(place), open_archive(place) as archive:
        for member, path in iter_members(archive, place):
            name = "" if path is None else path.name
            if name in wanted and member.size > FILE_BYTES_MAX:
                raise SourceError(
                    f"{place}: {path} has {member.size} bytes, which no file of CIFAR has; download it again"
                )
            if name and (also_others or name in wanted):
                yield name, read_member(archive, member) if name in wanted else None
