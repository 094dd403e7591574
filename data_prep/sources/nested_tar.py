"""A source that reads ILSVRC2012's training archive: a .tar of one .tar per class, named by its WordNet id."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastbyol.data_prep.sources.source import Sample, SourceError, is_image, listing_progress
from fastbyol.data_prep.sources.tar import archive_errors, iter_members, open_archive, open_inner, read_member

INNER_SUFFIX = ".tar"


class NestedTarSource:
    """Images in a .tar of uncompressed .tar files; the class is the inner archive's name without its suffix.

    Inner archives are read in place, in the order of the outer archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignored = 0
        counts: dict[PurePosixPath, int] = {}
        with archive_errors(path), open_archive(path) as outer:
            for inner, name in listing_progress(_images(outer, path)):
                counts.setdefault(inner, 0)
                counts[inner] += name is not None
                self.ignored += name is None
        self.count = sum(counts.values())
        if not self.count:
            raise SourceError(
                f"{path}: no images in its inner archives; give a .tar that holds one .tar of images per class"
            )
        inners = {inner.stem: inner for inner in sorted(counts) if counts[inner]}
        if len(inners) < sum(map(bool, counts.values())):
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
