"""Know ILSVRC2012's training archive: a .tar of .tar files, one a class, named by its WordNet id."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastbyol.data_prep.sources.source import Sample, SourceError, is_image, listing
from fastbyol.data_prep.sources.tar import content, files, open_archive, open_inner, readable

INNER_SUFFIX = ".tar"


class NestedTarSource:
    """Read a .tar of plain .tar files; the class of an image is the name of the inner archive without its suffix.

    Inner archives are read in place, as a window of the outer one, in the outer one's order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignored = 0
        counts: dict[PurePosixPath, int] = {}
        with readable(path), open_archive(path) as outer:
            for inner, name in listing(_images(outer, path)):
                counts.setdefault(inner, 0)
                counts[inner] += name is not None
                self.ignored += name is None
        self.count = sum(counts.values())
        if not self.count:
            raise SourceError(f"{path}: no images in its inner archives; give a .tar of one .tar of images a class")
        inners = {inner.stem: inner for inner in sorted(counts) if counts[inner]}
        if len(inners) < sum(map(bool, counts.values())):
            raise SourceError(f"{path}: two inner archives have one name; give one split")
        self.class_names: list[str] | None = sorted(inners)
        self.class_counts: list[int] | None = [counts[inners[name]] for name in self.class_names]

    def __iter__(self) -> Iterator[Sample]:
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        with readable(self.path), open_archive(self.path) as outer:
            for inner, name, archive, member in _walk(outer, self.path):
                if name is not None and is_image(name.name):
                    yield Sample(f"{inner.stem}/{name}", labels[inner.stem], content(archive, member))


def _images(outer: tarfile.TarFile, path: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath | None]]:
    """Yield the inner archive and the name of each file in it; None for a file that is no image."""
    for inner, name, _, _ in _walk(outer, path):
        yield inner, name if name is not None and is_image(name.name) else None


def _walk(
    outer: tarfile.TarFile, path: Path
) -> Iterator[tuple[PurePosixPath, PurePosixPath | None, tarfile.TarFile, tarfile.TarInfo]]:
    """Yield each file of each inner archive, with the archive it can be read from."""
    for member, name in files(outer, path):
        if name is None or name.suffix != INNER_SUFFIX:
            if name is not None and is_image(name.name):
                raise SourceError(f"{path}: image {name} lies beside inner archives; pack one kind a .tar")
            continue
        place = path / name
        with readable(place), open_inner(outer, member) as archive:
            for inner_member, inner_name in files(archive, place):
                yield name, inner_name, archive, inner_member
