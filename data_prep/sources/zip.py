"""A source that reads images out of a .zip, one at a time: nothing is unpacked, no name may point outside."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from fastbyol.data_prep.formats import HEAD_BYTES, is_image_file
from fastbyol.data_prep.sources.base import FILE_BYTES_MAX, Sample, SourceError
from fastbyol.data_prep.sources.classes import Labels
from fastbyol.data_prep.sources.tar import ArchiveSource, check_member

ENCRYPTED = 0x1  # a flag of a member
HIDDEN_FOLDER = "__MACOSX"  # holds what macOS knows of each file
# ValueError: a member of a damaged archive may begin before the file does.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError)


class ZipSource(ArchiveSource):
    """Images in a .zip. The archive's index is held in memory."""

    def __init__(self, path: Path, *, labels: Labels = "auto") -> None:
        with _zip_errors(path), zipfile.ZipFile(path) as archive:
            members = ((name, _is_image(archive, member, name)) for member, name in _members(archive, path))
            super().__init__(path, members, labels)

    def __iter__(self) -> Iterator[Sample]:
        with _zip_errors(self.path), zipfile.ZipFile(self.path) as archive:
            for member, name in _members(archive, self.path):
                if name is not None and name.parent in self._label_of and _is_image(archive, member, name):
                    yield Sample(str(name), self._label_of[name.parent], _read(archive, member, FILE_BYTES_MAX))


def _members(archive: zipfile.ZipFile, path: Path) -> Iterator[tuple[zipfile.ZipInfo, PurePosixPath | None]]:
    """Yield the members that are no folders, with their names; None for a hidden file."""
    for member in archive.infolist():
        name = check_member(path, member.filename, member.file_size)
        if member.is_dir():
            continue
        if member.flag_bits & ENCRYPTED:
            raise SourceError(f"{path}: member {name} is encrypted; pack it again without a password")
        is_hidden = any(part.startswith(".") or part == HIDDEN_FOLDER for part in name.parts)
        yield member, None if is_hidden else name


def _is_image(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: PurePosixPath | None) -> bool:
    return name is not None and is_image_file(name.name, partial(_read, archive, member, HEAD_BYTES))


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int) -> bytes:
    """Return up to `count` bytes of a member, whatever size its header claims."""
    with archive.open(member) as stream:
        return stream.read(count)


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Raise SourceError for any error of reading an archive in the with-block."""
    try:
        yield
    except SourceError:
        raise
    except ZIP_ERRORS as error:
        raise SourceError(f"{path}: damaged, cut short, or of another kind: {error}; pack it again") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}; copy it again") from error
