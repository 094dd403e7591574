"""A source that reads WebDataset shards: .tar files where consecutive files with one key are one sample."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastbyol.data_prep.formats import is_image
from fastbyol.data_prep.sources.base import Sample, SourceError, listing_progress
from fastbyol.data_prep.sources.labels import LabelCounter, label_index
from fastbyol.data_prep.sources.tar import LINK_OR_HIDDEN, archive_errors, iter_members, open_archive, read_member

JSON_SUFFIX, JSON_LABEL = "json", "label"
TEXT_SUFFIX = "txt"  # a label where it holds a number, else a caption
LABEL_BYTES_MAX = 1 << 20


class _Member(NamedTuple):
    """A file of a shard; its key is its path up to a dot of its name, its suffix is the rest in lower case."""

    key: str
    suffix: str  # "" for a link or a hidden file
    name: str
    data: bytes | None  # None if it was not read

    @property
    def is_image(self) -> bool:
        return is_image(f"x.{self.suffix}")

    @property
    def kind(self) -> str:
        """What it is, where it is passed over."""
        return f".{self.suffix}" if self.suffix else LINK_OR_HIDDEN


class _Group(NamedTuple):
    """One sample of a shard; `image` is None if it has none; `ignored`: what the files are that are not used."""

    image: _Member | None
    label: object
    ignored: list[str]


class _DotsInNames(Exception):
    """The first dot of a name does not end its key."""


class WebDatasetSource:
    """Images in WebDataset shards, in the order given; the label is in .cls, else under a key of .json, else in .txt.

    `label_column` is that key, or the suffix of the file with the label; if it is given, no other is read. A label is
    the number or the name of a class, in .txt only a number. `image_key` is the suffix of the image, where samples have
    several. A key ends at the first dot of a name; at the last, if the first would join images that have label files of
    their own. Raises SourceError for labels that do not lie beside their images, and for samples of several images
    without `image_key`.
    """

    def __init__(
        self, path: Path, shards: list[Path], *, label_column: str | None = None, image_key: str | None = None
    ) -> None:
        self.path = path
        self._shards = shards
        self._label_column = label_column
        self._asked = (label_column or "").lower().lstrip(".")  # as a suffix
        self._image_key = image_key.lower().lstrip(".") if image_key else None
        self._has_dots = False
        try:
            self._list()
        except _DotsInNames:
            self._has_dots = True
            self._list()

    def _list(self) -> None:
        """Count the samples, their labels and the files that are not used."""
        self.count, self.ignored = 0, Counter[str]()
        labels, apart, captioned = LabelCounter(self.path), "", ""
        for group in listing_progress(self._groups(with_images=False), " samples"):
            self.ignored.update(group.ignored)
            if group.image is not None:
                self.count += 1
                labels.add(group.label, group.image.name)
                if group.label is None and f".{TEXT_SUFFIX}" in group.ignored:
                    captioned = captioned or group.image.name
            elif group.label is not None:
                apart = apart or str(group.label)
        if not self.count:
            key = f" with the suffix .{self._image_key}" if self._image_key else ""
            raise SourceError(f"{self.path}: no images{key} in {len(self._shards)} shards; give .tar files of images")
        self.class_names, self.class_counts = labels.classes()
        is_partly_labelled = self.count > sum(self.class_counts or ())
        if apart and is_partly_labelled:
            raise SourceError(
                f"{self.path}: labels such as {apart} do not lie beside their images; pack each image and its label "
                "side by side, as tar --sort=name does, or give --labels none"
            )
        if self.class_names is not None and captioned:
            raise SourceError(
                f"{self.path}: the .{TEXT_SUFFIX} of {captioned} is no number, and those of other images are taken for "
                "labels; name the files or the key of the labels with --label-column, or give --labels none"
            )
        if self.class_names is None and self._label_column:
            raise SourceError(
                f"{self.path}: no .json has a key {self._label_column!r}, and no file has that suffix; give another "
                "--label-column"
            )

    def __iter__(self) -> Iterator[Sample]:
        known = label_index(self.class_names)
        for group in self._groups(with_images=True):
            if group.image is not None:
                assert group.image.data is not None, "images were asked for"
                yield Sample(group.image.name, known.get(group.label), group.image.data)

    def _groups(self, *, with_images: bool) -> Iterator[_Group]:
        """Yield the samples of all shards."""
        for shard in self._shards:
            with archive_errors(shard), open_archive(shard) as archive:
                members = _members(archive, shard, with_images=with_images, has_dots=self._has_dots, also=self._asked)
                for _, group in groupby(members, lambda member: member.key):
                    yield self._sample(list(group), shard)

    def _sample(self, group: list[_Member], shard: Path) -> _Group:
        """Find the image and the label of one sample."""
        images = [member for member in group if member.is_image]
        if self._image_key is not None:
            images = [image for image in images if image.suffix == self._image_key]
        if len(images) > 1:
            self._explain(images, group, shard)
        label, used = self._label(group, shard)
        unused = [member for member in group if not images or (member not in images and member not in used)]
        return _Group(
            images[0] if images else None,
            label,
            [member.kind for member in unused],
        )

    def _label(self, group: list[_Member], shard: Path) -> tuple[object, list[_Member]]:
        """Return the label of a sample, None if there is none, and the files it may be in."""
        read = [member for member in group if member.data is not None and not member.is_image]
        of_suffix = {member.suffix: member for member in read}
        asked = self._asked
        classes = [asked] if asked in of_suffix else [] if asked else [s for s in of_suffix if _is_class_file(s)]
        if len(classes) > 1:
            raise SourceError(
                f"{shard}: {group[0].key} has labels in {' and '.join(classes)}; name one, as in --label-column "
                f"{classes[0]}"
            )
        label: object = _text_of(of_suffix[classes[0]], shard) if classes else None
        used = [member for member in read if member.suffix != TEXT_SUFFIX or member.suffix in classes]
        if label is None and JSON_SUFFIX in of_suffix:
            label = _json_of(of_suffix[JSON_SUFFIX], shard, self._label_column or JSON_LABEL)
        if label is None and not asked and TEXT_SUFFIX in of_suffix:
            label = _number_of(of_suffix[TEXT_SUFFIX])
            used += [of_suffix[TEXT_SUFFIX]] if label is not None else []
        return label, used

    def _explain(self, images: list[_Member], group: list[_Member], shard: Path) -> None:
        """Raise _DotsInNames where each image of one key has a label file of its own, else SourceError."""
        labelled = {member.suffix.rpartition(".")[0] for member in group if _may_hold_label(member.suffix)}
        parts = {image.suffix.rpartition(".")[0] for image in images}
        if not self._has_dots and len(parts) == len(images) and labelled >= parts:
            raise _DotsInNames
        both = " and ".join(member.name for member in images[:2])
        raise SourceError(
            f"{shard}: {both} have one key and so are one sample; give --image-key {images[0].suffix} to take that one "
            "of each sample, or --labels none to take each image by itself"
        )


class ImagesOfShards:
    """Every image of WebDataset shards by itself, without labels."""

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self._shards = shards
        self.class_names: list[str] | None = None
        self.class_counts: list[int] | None = None
        self.count, self.ignored = 0, Counter[str]()
        for member in listing_progress(self._members(with_images=False)):
            if member.is_image:
                self.count += 1
            else:
                self.ignored[member.kind] += 1
        if not self.count:
            raise SourceError(f"{path}: no images in {len(shards)} shards; give .tar files of images")

    def __iter__(self) -> Iterator[Sample]:
        for member in self._members(with_images=True):
            if member.is_image:
                assert member.data is not None, "images were asked for"
                yield Sample(member.name, None, member.data)

    def _members(self, *, with_images: bool) -> Iterator[_Member]:
        for shard in self._shards:
            with archive_errors(shard), open_archive(shard) as archive:
                yield from _members(archive, shard, with_images=with_images, has_dots=True)


def is_shard(path: Path, *, look_at: int = 200) -> bool:
    """Return whether the first `look_at` files of a .tar hold an image and a label with the same key.

    A .json inside a folder does not count, nor does a .txt that holds no number: archives of class folders carry
    captions and the like beside their images.
    """
    images: set[str] = set()
    labels: set[str] = set()
    with archive_errors(path), open_archive(path) as archive:
        members = _members(archive, path, with_images=False, has_dots=False)
        for member, _ in zip(members, range(look_at), strict=False):
            if member.is_image:
                images.add(member.key)
            elif (
                _is_class_file(member.suffix)
                or (member.suffix == JSON_SUFFIX and "/" not in member.key)
                or (member.suffix == TEXT_SUFFIX and _number_of(member) is not None)
            ):
                labels.add(member.key)
    return bool(images & labels)


def _members(
    archive: tarfile.TarFile, shard: Path, *, with_images: bool, has_dots: bool, also: str = ""
) -> Iterator[_Member]:
    """Yield the files of a shard, with the bytes of images, if asked for, and of files that may hold labels.

    also: another suffix of such files.
    """
    for info, path in iter_members(archive, shard):
        key, suffix = _split(path or PurePosixPath(info.name), has_dots=has_dots)
        is_companion = path is not None and (
            _is_class_file(suffix) or suffix in (JSON_SUFFIX, TEXT_SUFFIX) or suffix == also != ""
        )
        if is_companion and suffix == TEXT_SUFFIX:
            is_companion = info.size <= LABEL_BYTES_MAX  # else it is no number
        if is_companion and info.size > LABEL_BYTES_MAX:
            raise SourceError(
                f"{shard}: {path} has {info.size} bytes; a label file may have up to {LABEL_BYTES_MAX}; remove it"
            )
        is_read = is_companion or (with_images and path is not None and is_image(path.name))
        # A link or a hidden file is skipped, whatever its suffix.
        yield _Member(
            key, suffix if path else "", str(path or info.name), read_member(archive, info) if is_read else None
        )


def _split(path: PurePosixPath, *, has_dots: bool) -> tuple[str, str]:
    """Return the key and the suffix of a file, which WebDataset splits at the first dot of the name."""
    stem, _, suffix = path.name.rpartition(".") if has_dots else path.name.partition(".")
    return str(path.parent / stem), suffix.lower()


def _is_class_file(suffix: str) -> bool:
    return suffix in ("cls", "cls.txt") or suffix.endswith(".cls")  # such as target.cls


def _may_hold_label(suffix: str) -> bool:
    return _is_class_file(suffix) or suffix.rpartition(".")[2] in (JSON_SUFFIX, TEXT_SUFFIX)


def _text_of(member: _Member, shard: Path) -> int | str | None:
    """Return the label in a text file: a number or a name; None if it is empty."""
    number = _number_of(member)
    if number is not None:
        return number
    try:
        return (member.data or b"").decode().strip() or None
    except UnicodeDecodeError as error:
        raise SourceError(f"{shard}: {member.name} is not text; wanted a number or a name") from error


def _number_of(member: _Member) -> int | None:
    """Return the whole number that a text file holds; None if it holds another text."""
    text = (member.data or b"").strip()
    return int(text) if len(text) < 20 and text.removeprefix(b"-").isdigit() else None


def _json_of(member: _Member, shard: Path, key: str) -> object:
    """Return the value of a key in a .json file; None if it is missing."""
    try:
        facts = json.loads(member.data or b"")
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{shard}: {member.name} is not JSON: {error}") from error
    return facts.get(key) if isinstance(facts, dict) else None
