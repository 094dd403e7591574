"""A source that reads images out of a .zip, one at a time: nothing is unpacked, no name may point outside."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fastbyol.data_prep.formats import HEAD_BYTES, SUFFIXES, format_of, is_image, kind_of
from fastbyol.data_prep.sources.base import FILE_BYTES_MAX, Sample, SourceError, listing_progress
from fastbyol.data_prep.sources.classes import Labels, group_archive
from fastbyol.data_prep.sources.tar import LINK_OR_HIDDEN

ENCRYPTED = 0x1  # a flag of a member
HIDDEN_FOLDER = "__MACOSX"  # holds what macOS knows of each file


class ZipSource:
    """Images in a .zip; its folders are read as those of a .tar. The archive's index is held: 0.5 KB a member."""

    def __init__(self, path: Path, *, labels: Labels = "auto") -> None:
        self.path = path
        self.ignored: Counter[str] = Counter()
        found: Counter[PurePosixPath] = Counter()
        with _zip_errors(path), zipfile.ZipFile(path) as archive:
            for member, name in listing_progress(_members(archive, path)):
                if name is None:
                    self.ignored[LINK_OR_HIDDEN] += 1
                elif _is_image_member(archive, member, name):
                    found[name.parent] += 1
                else:
                    self.ignored[kind_of(name.name)] += 1
        self.count = found.total()
        if not self.count:
            raise SourceError(f"{path}: no images in the archive; known suffixes are {' '.join(sorted(SUFFIXES))}")
        groups = group_archive(path, found, labels)
        self.class_names, self.class_counts, self._label_of = groups.names, groups.counts, groups.label_of
        self.ignored.update(groups.left_out)
        self.count -= sum(groups.left_out.values())

    def __iter__(self) -> Iterator[Sample]:
        with _zip_errors(self.path), zipfile.ZipFile(self.path) as archive:
            for member, name in _members(archive, self.path):
                if name is not None and name.parent in self._label_of and _is_image_member(archive, member, name):
                    yield Sample(str(name), self._label_of[name.parent], _read(archive, member))


def _members(archive: zipfile.ZipFile, path: Path) -> Iterator[tuple[zipfile.ZipInfo, PurePosixPath | None]]:
    """Yield the members that are no folders, with their names; None for a hidden file."""
    for member in archive.infolist():
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts:
            raise SourceError(
                f"{path}: member {member.filename!r} points outside the archive; pack it with plain names"
            )
        if member.is_dir():
            continue
        if member.flag_bits & ENCRYPTED:
            raise SourceError(f"{path}: member {name} is encrypted; pack it again without a password")
        if is_image(name.name) and member.file_size > FILE_BYTES_MAX:
            raise SourceError(
                f"{path}: {name} has {member.file_size} bytes; an image may have up to {FILE_BYTES_MAX}; remove it"
            )
        is_hidden = any(part.startswith(".") or part == HIDDEN_FOLDER for part in name.parts)
        yield member, None if is_hidden else name


def _is_image_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: PurePosixPath) -> bool:
    """Return whether a member has an image's suffix or, without a suffix, an image's first bytes."""
    return is_image(name.name) or (not name.suffix and format_of(_read(archive, member, HEAD_BYTES)) is not None)


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int = FILE_BYTES_MAX) -> bytes:
    """Return up to `count` bytes of a member, whatever size its header claims."""
    with archive.open(member) as stream:
        return stream.read(count)


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Raise SourceError for any error of reading an archive in the with-block."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{path}: damaged, cut short, or of another kind: {error}; copy it or pack it again"
        ) from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}; copy it again") from error
