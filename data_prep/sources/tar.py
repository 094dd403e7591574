"""A source that streams images out of a .tar: nothing is unpacked, no link followed, no name may point outside."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from fastbyol.data_prep.formats import HEAD_BYTES, SUFFIXES, format_of, is_image, is_image_file, kind_of
from fastbyol.data_prep.sources.base import FILE_BYTES_MAX, Sample, SourceError, listing_progress
from fastbyol.data_prep.sources.classes import Labels, group_archive

# OverflowError: a header may claim a size or a position that no file has.
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OverflowError)
EXTENDED = b"xgXLK"  # types of members with a long header for the next one: pax, Solaris's pax, GNU's long names
# tarfile reads each in one piece; extended attributes, the longest part, have up to 64 KiB.
EXTENDED_BYTES_MAX = 1 << 18
LINK_OR_HIDDEN = "hidden files, links or devices"


class UnsupportedArchive(tarfile.TarError):
    """Content of an archive that is not supported; the message has the remedy."""


class _StrictHeader(tarfile.TarInfo):
    """A member's header that raises an error where tarfile is lenient.

    TarFile takes a damaged header, or the end of the file, for the end of the archive, so that the images after it
    would be lost silently. It also trusts headers: sparse members, which are small on disk and of any size in memory,
    and long headers are refused here before they are used.
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
            raise UnsupportedArchive(
                f"has a damaged header at byte {begin} ({error}); copy it again, or pack it again"
            ) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED and header.size > EXTENDED_BYTES_MAX:
            raise UnsupportedArchive(
                f"has a header of {header.size} bytes; at most {EXTENDED_BYTES_MAX} are read; pack it again"
            )
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(header)
        _require_size(header)
        return header

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, *_: object) -> None:
        """Refuse pax's sparse members; TarInfo calls this method and would read their map of any length."""
        raise _sparse(member)


def _require_size(member: tarfile.TarInfo) -> None:
    if member.size < 0:
        raise UnsupportedArchive(f"has a damaged header: member {member.name!r} has {member.size} bytes; pack it again")


def _sparse(member: tarfile.TarInfo) -> UnsupportedArchive:
    return UnsupportedArchive(f"member {member.name!r} is sparse; pack it again, without --sparse")


class ArchiveSource:
    """What the sources of .tar and .zip share: the folders of images in an archive, read as those of FolderSource.

    They lie below any leading folders. An archive of one folder of images has no labels.
    """

    def __init__(self, path: Path, members: Iterable[tuple[PurePosixPath | None, bool]], labels: Labels) -> None:
        """Take the name of each member, None for one that is passed over whatever it is, and whether it is an image."""
        self.path = path
        self.ignored: Counter[str] = Counter()
        found: Counter[PurePosixPath] = Counter()
        for name, is_found in listing_progress(members):
            if name is not None and is_found:
                found[name.parent] += 1
            else:
                self.ignored[LINK_OR_HIDDEN if name is None else kind_of(name.name)] += 1
        if not found:
            raise SourceError(f"{path}: no images in the archive; known suffixes are {' '.join(sorted(SUFFIXES))}")
        groups = group_archive(path, found, labels)
        self.class_names, self.class_counts, self._label_of = groups.names, groups.counts, groups.label_of
        self.ignored.update(groups.left_out)
        self.count = found.total() - sum(groups.left_out.values())


class TarSource(ArchiveSource):
    """Images in a .tar, compressed or not.

    The headers are read once to find the classes; each iteration then streams the archive in its own order.
    """

    def __init__(self, path: Path, *, labels: Labels = "auto") -> None:
        with archive_errors(path), open_archive(path) as archive:
            members = (
                (name, name is not None and is_image_file(name.name, partial(read_member, archive, member, HEAD_BYTES)))
                for member, name in iter_members(archive, path)
            )
            super().__init__(path, members, labels)

    def __iter__(self) -> Iterator[Sample]:
        with archive_errors(self.path), open_archive(self.path) as archive:
            for member, name in iter_members(archive, self.path):
                if name is None or name.parent not in self._label_of or not (is_image(name.name) or not name.suffix):
                    continue
                data = read_member(archive, member, min(member.size, FILE_BYTES_MAX))  # a stream cannot go back
                if is_image(name.name) or format_of(data) is not None:
                    yield Sample(str(name), self._label_of[name.parent], data)


def open_archive(path: Path) -> tarfile.TarFile:
    """Open an archive, compressed or not."""
    return tarfile.open(path, tarinfo=_StrictHeader)


def is_archive(path: Path) -> bool:
    """Return whether a file starts like an archive."""
    try:
        open_archive(path).close()
    except tarfile.ReadError:
        return False
    return True


def open_inner(outer: tarfile.TarFile, member: tarfile.TarInfo) -> tarfile.TarFile:
    """Open an uncompressed archive inside another, without unpacking it.

    It is read forward only: detecting a compression would seek back, and a compressed outer archive would then start
    over.
    """
    return tarfile.open(fileobj=outer.extractfile(member), mode="r:", tarinfo=_StrictHeader)


def iter_members(archive: tarfile.TarFile, place: Path) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath | None]]:
    """Yield the members that are not folders, with their names; the name of a hidden file, link or device is None.

    Raises SourceError for a name that points outside the archive, and for an image of more than FILE_BYTES_MAX. Members
    already yielded are dropped; tarfile's own iterator would keep all of them in memory.
    """
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        _require_size(member)  # a pax header may have changed it
        if member.issparse():
            raise _sparse(member)
        if sum(map(len, archive.pax_headers.values())) > EXTENDED_BYTES_MAX:
            raise UnsupportedArchive(f"has more than {EXTENDED_BYTES_MAX} bytes of global headers; pack it again")
        name = check_member(place, member.name, member.size)
        if member.isdir():
            continue
        is_plain = member.isreg() and not any(part.startswith(".") for part in name.parts)
        yield member, name if is_plain else None
    _require_end(archive, place)


def check_member(place: Path, name: str, size: int) -> PurePosixPath:
    """Return a member's name; raise SourceError for one that points outside, or an image of over FILE_BYTES_MAX."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(f"{place}: member {name!r} points outside the archive; pack it with plain names")
    if is_image(path.name) and size > FILE_BYTES_MAX:
        raise SourceError(
            f"{place}: member {path} has {size} bytes; an image may have up to {FILE_BYTES_MAX}; remove it"
        )
    return path


def _require_end(archive: tarfile.TarFile, place: Path) -> None:
    """Read the rest after the end mark, to check a compressed archive's checksum and find concatenated archives."""
    assert archive.fileobj is not None, "the archive is open"
    while rest := archive.fileobj.read(1 << 20):
        if rest.count(0) < len(rest):
            raise SourceError(f"{place}: data follows the archive's end; give concatenated archives one by one")


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, count: int = -1) -> bytes:
    """Return the bytes of a regular member, or its first `count`; raise TarError if the archive ends before them."""
    stream = archive.extractfile(member)
    assert stream is not None, "iter_members() yields names of regular members only"
    with stream:
        return stream.read(count)


@contextmanager
def archive_errors(path: Path) -> Iterator[None]:
    """Raise SourceError for any error of reading an archive in the with-block."""
    try:
        yield
    except UnsupportedArchive as error:
        raise SourceError(f"{path}: {error}") from error
    except TAR_ERRORS as error:
        raise SourceError(f"{path}: damaged or cut short: {error}; copy it again") from error
    except OSError as error:
        raise SourceError(f"{error.filename or path}: cannot be read: {error.strerror or error}; copy it again") from (
            error
        )


INNER_SUFFIX = ".tar"
NOT_IMAGES = "that are no images"


def is_nested(path: Path) -> bool:
    """Return whether the first file of a .tar is a .tar."""
    with archive_errors(path), open_archive(path) as archive:
        for _, name in iter_members(archive, path):
            if name is not None:
                return name.suffix == INNER_SUFFIX
    return False


class NestedTarSource:
    """Images in a .tar of uncompressed .tar files; the class is the inner archive's name without its suffix.

    Inner archives are read in place, in the order of the outer archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignored: Counter[str] = Counter()
        counts: dict[PurePosixPath, int] = {}
        with archive_errors(path), open_archive(path) as outer:
            for inner, name in listing_progress(_images(outer, path)):
                counts.setdefault(inner, 0)
                counts[inner] += name is not None
                if name is None:
                    self.ignored[NOT_IMAGES] += 1
        self.count = sum(counts.values())
        if not self.count:
            raise SourceError(
                f"{path}: no images in its inner archives; give a .tar that holds one .tar of images per class"
            )
        inners = {inner.stem: inner for inner in counts}
        if len(inners) < len(counts):
            raise SourceError(f"{path}: two inner archives have the same name; give one split")
        self.class_names: list[str] | None = sorted(inners)
        self.class_counts: list[int] | None = [counts[inners[name]] for name in self.class_names]

    def __iter__(self) -> Iterator[Sample]:
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        with archive_errors(self.path), open_archive(self.path) as outer:
            for inner, name, archive, member in _walk(outer, self.path):
                if name is not None and is_image(name.name):
                    yield Sample(f"{inner.stem}/{name}", labels[inner.stem], read_member(archive, member))


def _images(outer: tarfile.TarFile, path: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath | None]]:
    """Yield the inner archive and the name of each file in it; the name is None for a file that is not an image."""
    for inner, name, _, _ in _walk(outer, path):
        yield inner, name if name is not None and is_image(name.name) else None


def _walk(
    outer: tarfile.TarFile, path: Path
) -> Iterator[tuple[PurePosixPath, PurePosixPath | None, tarfile.TarFile, tarfile.TarInfo]]:
    """Yield each file of each inner archive, with the archive it can be read from."""
    for member, name in iter_members(outer, path):
        if name is None or name.suffix != INNER_SUFFIX:
            if name is not None and is_image(name.name):
                raise SourceError(f"{path}: image {name} lies beside inner archives; pack only one kind into a .tar")
            continue
        place = path / name
        with archive_errors(place), open_inner(outer, member) as archive:
            for inner_member, inner_name in iter_members(archive, place):
                yield name, inner_name, archive, inner_member
