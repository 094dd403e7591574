"""The interface of a source of images, and its samples."""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
FILE_BYTES_MAX = 1 << 28  # a larger "image" would not fit in memory with its pixels


class SourceError(ValueError):
    """A source that cannot be used; the message has the reason and what to pass instead."""


@dataclass(frozen=True)
class Sample:
    """One image of a source; a file is read only when needed, so that slow disks are read in parallel.

    root: the folder that a file has to lie in, None for any.
    """

    name: str
    label: int | None
    content: bytes | Path
    root: Path | None = None

    def read(self) -> bytes:
        """Return the file's bytes; raise OSError if it cannot be read, or lies outside the root."""
        if isinstance(self.content, bytes):
            return self.content
        if self.root is not None and not self.content.resolve().is_relative_to(self.root.resolve()):
            raise OSError(errno.EACCES, "its path leads out of what was fetched", str(self.content))
        return read_file(self.content)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file; raise OSError for a device or a pipe, which may never end, and for a large file."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    if facts.st_size > FILE_BYTES_MAX:
        raise OSError(errno.EFBIG, f"more than {FILE_BYTES_MAX} bytes", str(path))
    return path.read_bytes()


class Source(Protocol):
    """A collection of images; it can be iterated any number of times and yields its samples in the same order.

    `class_names` maps label to name, and `class_counts` label to number of images; both are None for unlabelled images.
    `count` is the number of samples; `ignored` counts the files that were passed over, by kind: their suffix, or what
    they are. Opening a source lists it but stores nothing per sample; iterating holds the names of one folder,
    or a few samples, at a time.
    """

    class_names: list[str] | None
    class_counts: list[int] | None
    count: int
    ignored: Counter[str]

    @property
    def path(self) -> Path | str:
        """Where it lies; the address of one that was fetched."""

    def __iter__(self) -> Iterator[Sample]: ...


def listing_progress(items: Iterable[Item], unit: str = " files") -> Iterable[Item]:
    """Wrap items in a progress bar that appears on a terminal once listing takes two seconds."""
    return tqdm(items, desc="listing", unit=unit, delay=2, disable=None, leave=False)
