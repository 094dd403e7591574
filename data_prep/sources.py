"""Know where images lie: class folders, a flat folder, or a .tar of either; each yields samples in a fixed order."""

from __future__ import annotations

import errno
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
# By name only to choose the files; what they hold is decided by their bytes.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
FILE_BYTES_MAX = 1 << 28  # a larger "image" would not fit memory beside its pixels
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


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

    `class_names` is None for unlabelled images, else label -> name, sorted; `count` is the number of samples;
    `ignored` counts files passed over: not named as images, links in archives.
    """

    path: Path
    class_names: list[str] | None
    count: int
    ignored: int

    def __iter__(self) -> Iterator[Sample]: ...


def open_source(path: str | os.PathLike[str]) -> Source:
    """Recognise what lies at the path; raise SourceError when nothing there is usable."""
    path = Path(path)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder; give a folder of images or a .tar of one")
    with _readable(path):
        is_tar = tarfile.is_tarfile(path)
    if not is_tar:
        raise SourceError(f"{path}: neither a folder nor a tar archive; give a folder of images or a .tar of one")
    return TarSource(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors while reading path into SourceError."""
    try:
        yield
    except TAR_ERRORS as error:
        raise SourceError(f"{path}: damaged or cut short: {error}; copy it again") from error
    except OSError as error:
        raise SourceError(f"{error.filename or path}: cannot be read: {error.strerror}; check the path") from error


class FolderSource:
    """Read FOLDER/CLASS/image, or FOLDER/image without labels; files and class folders may be symbolic links."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _readable(path):
            folders = sorted(e.name for e in os.scandir(path) if not e.name.startswith(".") and e.is_dir())
            bar = _bar(["", *folders], " folders")
            listings = {folder: _list_files(path / folder) for folder in bar}
        counts = {folder: sum(map(is_image, names)) for folder, names in listings.items()}
        self.count = sum(counts.values())
        self.ignored = sum(map(len, listings.values())) - self.count
        flat = counts.pop("")
        classes = [folder for folder, count in counts.items() if count]
        if flat and classes:
            raise SourceError(
                f"{path}: {flat} images lie beside class folders such as {classes[0]}; move one kind away"
            )
        if not self.count:
            raise SourceError(f"{path}: no images in it or in class folders; {self._advice()}")
        self.class_names = classes or None

    def __iter__(self) -> Iterator[Sample]:
        with _readable(self.path):
            for label, folder in enumerate(self.class_names or [""]):
                for name in filter(is_image, _list_files(self.path / folder)):
                    known = None if self.class_names is None else label
                    yield Sample(f"{folder}/{name}" if folder else name, known, self.path / folder / name)

    def _advice(self) -> str:
        """Say which folder below holds class folders, when one does."""
        for folder, folders, names in os.walk(self.path):
            folders.sort()
            if any(map(is_image, names)):
                return f"images lie deeper: give {Path(folder).parent} instead"
        return f"known suffixes are {' '.join(sorted(SUFFIXES))}"


class TarSource:
    """Read a .tar, compressed or not, of class folders or of one flat folder, below any leading folders.

    The headers are read once to learn the classes; each iteration then streams the archive in its own order. Nothing is
    unpacked, links are never followed, and a name that points outside the archive is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.ignored = 0
        folders: set[PurePosixPath] = set()
        with _readable(path), tarfile.open(path) as archive:
            for member in _bar(_members(archive), " files"):
                name = self._image_name(member)
                if name is None:
                    self.ignored += not member.isdir()
                else:
                    self.count += 1
                    folders.add(name.parent)
        if not self.count:
            raise SourceError(f"{path}: no images in the archive; known suffixes are {' '.join(sorted(SUFFIXES))}")
        if len({(len(folder.parts), folder.parts[:-1]) for folder in folders}) > 1:
            examples = " and ".join(map(str, sorted(folders)[:: len(folders) - 1]))
            raise SourceError(f"{path}: images lie in folders of different parents, {examples}; pack one split a .tar")
        self.class_names = sorted(folder.name for folder in folders) if len(folders) > 1 else None

    def __iter__(self) -> Iterator[Sample]:
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        with _readable(self.path), tarfile.open(self.path) as archive:
            for member in _members(archive):
                name = self._image_name(member)
                stream = None if name is None else archive.extractfile(member)
                if name is not None and stream is not None:
                    yield Sample(str(name), labels.get(name.parent.name), stream.read())

    def _image_name(self, member: tarfile.TarInfo) -> PurePosixPath | None:
        """Return the name of a member that is a visible image file, None for any other; refuse what lies outside."""
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise SourceError(
                f"{self.path}: member {member.name!r} points outside the archive; pack it with plain names"
            )
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not member.isreg() or not is_image(name.name):
            return None
        if member.size > FILE_BYTES_MAX:
            raise SourceError(
                f"{self.path}: member {name} has {member.size} bytes; an image has up to {FILE_BYTES_MAX}"
            )
        return name


def is_image(name: str) -> bool:
    """Tell whether a file has an image's suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - a Path for each of a million names is slow


def _bar(items: Iterable[Item], unit: str) -> Iterable[Item]:
    """Show on a terminal how far a listing is once it takes two seconds."""
    return tqdm(items, desc="listing", unit=unit, delay=2, disable=None, leave=False)


def _list_files(folder: Path) -> list[str]:
    """List the names of a folder's visible files, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_file())


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Walk an archive without keeping its members: tarfile's own iterator holds all of them in memory."""
    while (member := archive.next()) is not None:
        yield member
        archive.members = []  # type: ignore[attr-defined]
