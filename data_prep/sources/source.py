"""Know what a source of images promises: samples in a fixed order, counted and labelled, however many there are."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
# By name only to choose the files; what they hold is decided by their bytes.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
FILE_BYTES_MAX = 1 << 28  # a larger "image" would not fit memory beside its pixels


class SourceError(ValueError):
    """Tell what is wrong with the source, and what to pass instead."""


@dataclass(frozen=True)
class Sample:
    """Name one image of a source; its content is read where it is needed, so that slow disks are read in parallel."""

    name: str
    label: int | None
    content: bytes | Path

    def read(self) -> bytes:
        """Return the file's bytes; raise OSError when it cannot be read."""
        if isinstance(self.content, bytes):
            return self.content
        if self.content.stat().st_size > FILE_BYTES_MAX:
            raise OSError(errno.EFBIG, f"more than {FILE_BYTES_MAX} bytes", str(self.content))
        return self.content.read_bytes()


class Source(Protocol):
    """Describe a place with images: iterate it, any number of times, for its samples in the same order.

    `class_names` is None for unlabelled images, else label -> name; `class_counts` is None with it, else the number of
    images of each label; `count` is the number of samples; `ignored` counts files passed over: not named as images,
    links in archives. Opening lists the source and keeps no entry for a sample; iterating holds the names of one
    folder, or a few samples, at a time.
    """

    path: Path
    class_names: list[str] | None
    class_counts: list[int] | None
    count: int
    ignored: int

    def __iter__(self) -> Iterator[Sample]: ...


def is_image(name: str) -> bool:
    """Tell whether a file has an image's suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - a Path for each of a million names is slow


def listing(items: Iterable[Item], unit: str = " files") -> Iterable[Item]:
    """Show on a terminal how far a listing is once it takes two seconds."""
    return tqdm(items, desc="listing", unit=unit, delay=2, disable=None, leave=False)
