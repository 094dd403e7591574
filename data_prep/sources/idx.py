"""A source that reads MNIST's format, idx: a file of gray images, and one of labels beside it; gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from fastbyol.data_prep.sources.base import FILE_BYTES_MAX, Sample, SourceError
from fastbyol.data_prep.sources.labels import LabelCounter, label_index

MAGIC = b"\0\0\x08"  # the last says that bytes follow; then the number of dimensions, and each of them in 4 bytes
GZIP = b"\x1f\x8b"
READ_BYTES = 1 << 20


class IdxSource:
    """The images of an idx file, and labels from the file whose name has labels-idx1 where its own has images-idx3.

    A class is named by its number. An image is handed on as a PGM, with its pixels as they are.
    """

    def __init__(self, path: Path, *, has_labels: bool = True) -> None:
        self.path = path
        self.ignored = Counter[str]()
        with _open(path) as (stream, shape):
            if len(shape) != 3 or not 0 < shape[1] * shape[2] <= FILE_BYTES_MAX:
                came = " x ".join(map(str, shape))
                raise SourceError(f"{path}: an array of {came}; wanted images, as in train-images-idx3-ubyte")
            self.count, self._height, self._width = shape
            _require_size(path, stream, math.prod(shape))
        if not self.count:
            raise SourceError(f"{path}: holds no images; download it again")
        self._labels = _read_labels(path, self.count) if has_labels else None
        labels = LabelCounter(path)
        for label, count in Counter(self._labels or b"").items():
            labels.add(label, "an image", count=count)
        self.class_names, self.class_counts = labels.classes()

    def __iter__(self) -> Iterator[Sample]:
        known = label_index(self.class_names)
        header = b"P5 %d %d 255\n" % (self._width, self._height)
        with _open(self.path) as (stream, _):
            for number in range(self.count):
                label = None if self._labels is None else known[self._labels[number]]
                pixels = stream.read(self._height * self._width)
                yield Sample(f"{self.path.name} image {number}", label, header + pixels)


def is_idx(path: Path) -> bool:
    """Return whether a file begins as idx, gzipped or not."""
    try:
        with _plain(path) as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except (OSError, EOFError, zlib.error):
        return False


def labels_beside(images: Path) -> Path | None:
    """Return the file of labels that belongs to a file of images, gzipped or not; None if it is not there."""
    return next((each for name in names_of_labels(images.name) if (each := images.with_name(name)).is_file()), None)


def names_of_labels(images: str) -> list[str]:
    """Return what the file of labels may be called that belongs to a file of images of that name."""
    stem = images.removesuffix(".gz")
    name = stem.replace("images", "labels").replace("idx3", "idx1")
    return [] if name == stem else [name, f"{name}.gz"]


def _read_labels(images: Path, count: int) -> bytes:
    path = labels_beside(images)
    if path is None:
        name = next(iter(names_of_labels(images.name)), "a file of labels")
        raise SourceError(f"{images}: no labels in {name} beside it; copy them there, or give --labels none")
    with _open(path) as (stream, shape):
        if shape != (count,):
            came = " x ".join(map(str, shape))
            raise SourceError(f"{path}: an array of {came} labels for {count} images of {images.name}; give its own")
        labels = stream.read(count)
        _require_size(path, stream, count, read=len(labels))
    return labels


def _require_size(path: Path, stream: IO[bytes], wanted: int, *, read: int = 0) -> None:
    """Read a file to its end, of whose values `read` are read; raise SourceError if it has more or fewer values."""
    while data := stream.read(READ_BYTES):
        read += len(data)
    if read != wanted:
        raise SourceError(f"{path}: holds {read} values where its header says {wanted}; download it again")


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open a file at its values, with its dimensions; raise SourceError for any error in the with-block."""
    try:
        with _plain(path) as stream:
            head = stream.read(4)
            sizes = stream.read(4 * head[-1] if head[:3] == MAGIC and len(head) == 4 else 0)
            shape = tuple(int.from_bytes(sizes[place : place + 4], "big") for place in range(0, len(sizes), 4))
            if not shape or len(sizes) != 4 * head[-1]:
                raise SourceError(f"{path}: no idx file of bytes, or cut short; download it again")
            yield stream, shape
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read: {error}; download it again") from error


def _plain(path: Path) -> IO[bytes]:
    """Open a file, or what was gzipped."""
    with path.open("rb") as stream:
        is_packed = stream.read(len(GZIP)) == GZIP
    return cast(IO[bytes], gzip.open(path)) if is_packed else path.open("rb")
