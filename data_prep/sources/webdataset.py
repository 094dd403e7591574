"""Know WebDataset shards: .tar files in which consecutive files of one key are one sample, an image and its label."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastbyol.data_prep.sources.labels import LabelCount, label_index
from fastbyol.data_prep.sources.source import Sample, SourceError, is_image, listing
from fastbyol.data_prep.sources.tar import content, files, open_archive, readable

CLASS_SUFFIXES = ("cls", "cls.txt")
JSON_SUFFIX, JSON_LABEL = "json", "label"
LABEL_BYTES_MAX = 1 << 20


class _Member(NamedTuple):
    """Hold a file of a shard: its key is its path up to the first dot of its name, its suffix what follows."""

    key: str
    suffix: str
    name: str
    data: bytes | None  # None where it was not asked for


class _Group(NamedTuple):
    """Hold one sample as a shard holds it; `image` is None for a sample without one."""

    image: _Member | None
    label: object
    passed_over: int


class WebDatasetSource:
    """Read the shards in the order given; the label comes from .cls, else from a key of .json, else there is none.

    `label_column` names that key, and then .cls is not read. A label is the number of a class or its name. A sample of
    several images is refused: which of them is the sample, only its author knows.
    """

    def __init__(self, path: Path, shards: list[Path], *, label_column: str | None = None) -> None:
        self.path = path
        self._shards = shards
        self._label_column = label_column
        self.count = self.ignored = 0
        labels = LabelCount(path)
        for group in listing(self._groups(with_images=False), " samples"):
            self.ignored += group.passed_over
            if group.image is not None:
                self.count += 1
                labels.add(group.label, group.image.name)
        if not self.count:
            raise SourceError(f"{path}: no images in {len(shards)} shards; give .tar files of images")
        self.class_names, self.class_counts = labels.classes()

    def __iter__(self) -> Iterator[Sample]:
        known = label_index(self.class_names)
        for group in self._groups(with_images=True):
            if group.image is not None:
                assert group.image.data is not None, "images were asked for"
                yield Sample(group.image.name, known.get(group.label), group.image.data)

    def _groups(self, *, with_images: bool) -> Iterator[_Group]:
        """Yield the samples of all shards."""
        wanted = (JSON_SUFFIX,) if self._label_column else (JSON_SUFFIX, *CLASS_SUFFIXES)
        for shard in self._shards:
            with readable(shard), open_archive(shard) as archive:
                members = _members(archive, shard, wanted=wanted, with_images=with_images)
                for _, group in groupby(members, lambda member: member.key):
                    yield self._sample(list(group), shard)

    def _sample(self, group: list[_Member], shard: Path) -> _Group:
        """Tell image and label of one sample apart."""
        images = [member for member in group if is_image(f"x.{member.suffix}")]
        if len(images) > 1:
            both = " and ".join(member.name for member in images[:2])
            raise SourceError(f"{shard}: {both} are one sample, by their key; pack one image a sample")
        companions = {member.suffix: member for member in group if member.data is not None and member not in images}
        label: object = None
        for suffix, member in companions.items():
            if suffix in CLASS_SUFFIXES:
                label = _class_of(member, shard)
        if label is None and JSON_SUFFIX in companions:
            label = _json_of(companions[JSON_SUFFIX], shard, self._label_column or JSON_LABEL)
        used = (len(images) + len(companions)) if images else 0
        return _Group(images[0] if images else None, label, len(group) - used)


def is_shard(path: Path, *, look_at: int = 200) -> bool:
    """Tell whether the first files of a .tar hold an image with a label of the same key.

    A .json inside a folder is no sign: archives of class folders carry captions and the like beside their images.
    """
    images: set[str] = set()
    labels: set[str] = set()
    with readable(path), open_archive(path) as archive:
        for member, _ in zip(_members(archive, path, wanted=(), with_images=False), range(look_at), strict=False):
            if is_image(f"x.{member.suffix}"):
                images.add(member.key)
            elif member.suffix in CLASS_SUFFIXES or (member.suffix == JSON_SUFFIX and "/" not in member.key):
                labels.add(member.key)
    return bool(images & labels)


def _members(archive: tarfile.TarFile, shard: Path, *, wanted: tuple[str, ...], with_images: bool) -> Iterator[_Member]:
    """Yield the files of a shard; of images and companions with the suffixes wanted, the bytes as well."""
    for info, path in files(archive, shard):
        key, suffix = _split(path or PurePosixPath(info.name))
        is_companion = suffix in wanted
        if path is not None and is_companion and info.size > LABEL_BYTES_MAX:
            raise SourceError(f"{shard}: {path} has {info.size} bytes; a label file has up to {LABEL_BYTES_MAX}")
        is_read = path is not None and (is_companion or (with_images and is_image(path.name)))
        # A link or a hidden file is passed over, whatever its suffix says.
        yield _Member(key, suffix if path else "", str(path or info.name), content(archive, info) if is_read else None)


def _split(path: PurePosixPath) -> tuple[str, str]:
    """Return key and suffix of a file: WebDataset cuts at the first dot of the name."""
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), suffix.lower()


def _class_of(member: _Member, shard: Path) -> int | str | None:
    """Return what a .cls file says: a number, or a name."""
    try:
        text = (member.data or b"").decode().strip()
    except UnicodeDecodeError as error:
        raise SourceError(f"{shard}: {member.name} is not text; wanted a number or a name") from error
    is_number = text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal() and len(text) < 20
    return int(text) if is_number else text or None


def _json_of(member: _Member, shard: Path, key: str) -> object:
    """Return what a .json file holds under the key; None when it does not have it."""
    try:
        facts = json.loads(member.data or b"")
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{shard}: {member.name} is not JSON: {error}") from error
    return facts.get(key) if isinstance(facts, dict) else None
