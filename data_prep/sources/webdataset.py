"""A source that reads WebDataset shards: .tar files where consecutive files with one key are one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastbyol.data_prep.sources.base import Sample, SourceError, is_image, listing_progress
from fastbyol.data_prep.sources.labels import LabelCounter, label_index
from fastbyol.data_prep.sources.tar import archive_errors, iter_members, open_archive, read_member

CLASS_SUFFIXES = ("cls", "cls.txt")
JSON_SUFFIX, JSON_LABEL = "json", "label"
LABEL_BYTES_MAX = 1 << 20


class _Member(NamedTuple):
    """A file of a shard; its key is its path up to the first dot of its name, its suffix is the rest."""

    key: str
    suffix: str
    name: str
    data: bytes | None  # None if it was not read


class _Group(NamedTuple):
    """One sample of a shard; `image` is None if it has none."""

    image: _Member | None
    label: object
    ignored: int


class WebDatasetSource:
    """Images in WebDataset shards, in the order given; the label is in .cls, else under a key of .json, else missing.

    `label_column` is that key; if it is given, .cls is not read. A label is the number or the name of a class. A sample
    with several images raises SourceError, because it is unknown which of them is meant.
    """

    def __init__(self, path: Path, shards: list[Path], *, label_column: str | None = None) -> None:
        self.path = path
        self._shards = shards
        self._label_column = label_column
        self.count = self.ignored = 0
        labels = LabelCounter(path)
        for group in listing_progress(self._groups(with_images=False), " samples"):
            self.ignored += group.ignored
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
            with archive_errors(shard), open_archive(shard) as archive:
                members = _members(archive, shard, wanted=wanted, with_images=with_images)
                for _, group in groupby(members, lambda member: member.key):
                    yield self._sample(list(group), shard)

    def _sample(self, group: list[_Member], shard: Path) -> _Group:
        """Find the image and the label of one sample."""
        images = [member for member in group if is_image(f"x.{member.suffix}")]
        if len(images) > 1:
            both = " and ".join(member.name for member in images[:2])
            raise SourceError(f"{shard}: {both} have one key and so are one sample; pack one image per sample")
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
    """Return whether the first `look_at` files of a .tar hold an image and a label with the same key.

    A .json inside a folder does not count: archives of class folders carry captions and the like beside their images.
    """
    images: set[str] = set()
    labels: set[str] = set()
    with archive_errors(path), open_archive(path) as archive:
        for member, _ in zip(_members(archive, path, wanted=(), with_images=False), range(look_at), strict=False):
            if is_image(f"x.{member.suffix}"):
                images.add(member.key)
            elif member.suffix in CLASS_SUFFIXES or (member.suffix == JSON_SUFFIX and "/" not in member.key):
                labels.add(member.key)
    return bool(images & labels)


def _members(archive: tarfile.TarFile, shard: Path, *, wanted: tuple[str, ...], with_images: bool) -> Iterator[_Member]:
    """Yield the files of a shard, with the bytes of images and of files with the suffixes wanted."""
    for info, path in iter_members(archive, shard):
        key, suffix = _split(path or PurePosixPath(info.name))
        is_companion = suffix in wanted
        if path is not None and is_companion and info.size > LABEL_BYTES_MAX:
            raise SourceError(
                f"{shard}: {path} has {info.size} bytes; a label file may have up to {LABEL_BYTES_MAX}; remove it"
            )
        is_read = path is not None and (is_companion or (with_images and is_image(path.name)))
        # A link or a hidden file is skipped, whatever its suffix.
        yield _Member(
            key, suffix if path else "", str(path or info.name), read_member(archive, info) if is_read else None
        )


def _split(path: PurePosixPath) -> tuple[str, str]:
    """Return the key and the suffix of a file, which WebDataset splits at the first dot of the name."""
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), suffix.lower()


def _class_of(member: _Member, shard: Path) -> int | str | None:
    """Return the label in a .cls file: a number or a name."""
    try:
        text = (member.data or b"").decode().strip()
    except UnicodeDecodeError as error:
        raise SourceError(f"{shard}: {member.name} is not text; wanted a number or a name") from error
    is_number = text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal() and len(text) < 20
    return int(text) if is_number else text or None


def _json_of(member: _Member, shard: Path, key: str) -> object:
    """Return the value of a key in a .json file; None if it is missing."""
    try:
        facts = json.loads(member.data or b"")
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{shard}: {member.name} is not JSON: {error}") from error
    return facts.get(key) if isinstance(facts, dict) else None
