"""Know how to read images out of a .tar as a stream: nothing is unpacked, no link followed, no name leads outside."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fastbyol.data_prep.sources.source import (
    FILE_BYTES_MAX,
    SUFFIXES,
    Sample,
    SourceError,
    is_image,
    listing,
)

# OverflowError: a header may claim a size or a position that no file has.
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OverflowError)
EXTENDED = b"xgXLK"  # types of members that hold a longer header of the next one: pax, Solaris's pax, GNU's long names
EXTENDED_BYTES_MAX = 1 << 18  # tarfile reads them whole; extended attributes, the longest part, have up to 64 KiB


class Refused(tarfile.TarError):
    """Tell what an intact archive holds that is not read, and what to do."""


class _StrictHeader(tarfile.TarInfo):
    """Read a member's header, or the zeros that end an archive.

    TarFile takes a damaged header, or the end of the file, for the end of the archive: images behind it would be lost
    without a word. It also believes what a header claims: sparse members, which are few bytes on disk and any number
    in memory, and long headers are refused before anything is made of them.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictHeader:
        begin = archive.offset
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {begin}") from error
        except (ValueError, RecursionError) as error:  # of pax headers
            raise Refused(f"has a damaged header at byte {begin} ({error}); copy it again, or pack it anew") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED and header.size > EXTENDED_BYTES_MAX:
            raise Refused(f"has a header of {header.size} bytes; up to {EXTENDED_BYTES_MAX} are read: pack it anew")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(header)
        _require_size(header)
        return header

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, *_: object) -> None:
        """Be called by TarInfo for pax's sparse members, whose map it would read whole, however long."""
        raise _sparse(member)


def _require_size(member: tarfile.TarInfo) -> None:
    if member.size < 0:
        raise Refused(f"has a damaged header: member {member.name!r} has {member.size} bytes; pack it anew")


def _sparse(member: tarfile.TarInfo) -> Refused:
    return Refused(f"member {member.name!r} is sparse; pack it anew, without --sparse")


class TarSource:
    """Read a .tar, compressed or not, of class folders or of one flat folder, below any leading folders.

    The headers are read once to learn the classes; each iteration then streams the archive in its own order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignored = 0
        counts: Counter[PurePosixPath] = Counter()
        with readable(path), open_archive(path) as archive:
            for _, name in listing(files(archive, path)):
                if name is None or not is_image(name.name):
                    self.ignored += 1
                else:
                    counts[name.parent] += 1
        self.count = counts.total()
        if not self.count:
            raise SourceError(f"{path}: no images in the archive; known suffixes are {' '.join(sorted(SUFFIXES))}")
        folders = sorted(counts)
        if len({(len(folder.parts), folder.parts[:-1]) for folder in folders}) > 1:
            examples = f"{folders[0]} and {folders[-1]}"
            raise SourceError(f"{path}: images lie in folders of different parents, {examples}; pack one split a .tar")
        self.class_names = [folder.name for folder in folders] if len(folders) > 1 else None
        self.class_counts = [counts[folder] for folder in folders] if len(folders) > 1 else None

    def __iter__(self) -> Iterator[Sample]:
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        with readable(self.path), open_archive(self.path) as archive:
            for member, name in files(archive, self.path):
                if name is not None and is_image(name.name):
                    yield Sample(str(name), labels.get(name.parent.name), content(archive, member))


def open_archive(path: Path) -> tarfile.TarFile:
    """Open an archive, compressed or not."""
    return tarfile.open(path, tarinfo=_StrictHeader)


def is_archive(path: Path) -> bool:
    """Tell whether a file begins as an archive does."""
    try:
        open_archive(path).close()
    except tarfile.ReadError:
        return False
    return True


def open_inner(outer: tarfile.TarFile, member: tarfile.TarInfo) -> tarfile.TarFile:
    """Open a plain archive where it lies inside another.

    It is read forward only; guessing a compression would seek back, which a compressed outer archive pays for by
    starting again.
    """
    return tarfile.open(fileobj=outer.extractfile(member), mode="r:", tarinfo=_StrictHeader)


def files(archive: tarfile.TarFile, place: Path) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath | None]]:
    """Walk the members that are no folders, with their names; None stands for a hidden file, a link or a device.

    Raises SourceError for a name that leads outside the archive, and for an image no decoder should be given. Members
    already passed are forgotten: tarfile's own iterator would hold all of them in memory.
    """
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        _require_size(member)  # a pax header may have changed it
        if member.issparse():
            raise _sparse(member)
        if sum(map(len, archive.pax_headers.values())) > EXTENDED_BYTES_MAX:
            raise Refused(f"has more than {EXTENDED_BYTES_MAX} bytes of global headers; pack it anew")
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise SourceError(f"{place}: member {member.name!r} points outside the archive; pack it with plain names")
        if is_image(name.name) and member.size > FILE_BYTES_MAX:
            raise SourceError(f"{place}: member {name} has {member.size} bytes; an image has up to {FILE_BYTES_MAX}")
        if member.isdir():
            continue
        is_plain = member.isreg() and not any(part.startswith(".") for part in name.parts)
        yield member, name if is_plain else None
    _require_end(archive, place)


def _require_end(archive: tarfile.TarFile, place: Path) -> None:
    """Read what follows the end mark: a compressed archive ends with a checksum, a joined one holds more images."""
    assert archive.fileobj is not None, "the archive is open"
    while rest := archive.fileobj.read(1 << 20):
        if rest.count(0) < len(rest):
            raise SourceError(f"{place}: data follows the archive's end; give joined archives one by one")


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a regular member; raise TarError when the archive ends before them."""
    stream = archive.extractfile(member)
    assert stream is not None, "files() names regular members only"
    with stream:
        return stream.read()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors while reading an archive into SourceError."""
    try:
        yield
    except Refused as error:
        raise SourceError(f"{path}: {error}") from error
    except TAR_ERRORS as error:
        raise SourceError(f"{path}: damaged or cut short: {error}; copy it again") from error
    except OSError as error:
        raise SourceError(f"{error.filename or path}: cannot be read: {error.strerror or error}; copy it again") from (
            error
        )
