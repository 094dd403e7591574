"""Classes from folders: which of them a class is, and whether a tree of folders can be read in two ways."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from fastbyol.data_prep.sources.base import SourceError

Labels = Literal["auto", "top", "parent", "none"]
LABELS: tuple[Labels, ...] = ("auto", "top", "parent", "none")
ROOT = PurePosixPath()
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"))
BESIDE = "images beside the class folders"


@dataclass(frozen=True)
class FolderGroups:
    """The folders of a source by class: names and counts by label, None without labels.

    Iterating yields (label, folder) of each folder with images, ordered by label and folder; label is None without
    labels. left_out: how many images belong to no class, by kind.
    """

    names: list[str] | None
    counts: list[int] | None
    label_of: dict[PurePosixPath, int | None]
    left_out: dict[str, int]

    def __iter__(self) -> Iterator[tuple[int | None, PurePosixPath]]:
        return iter(sorted(((label, folder) for folder, label in self.label_of.items()), key=_by_label))


def _by_label(item: tuple[int | None, PurePosixPath]) -> tuple[int, PurePosixPath]:
    return (-1 if item[0] is None else item[0]), item[1]


def group_by_class(path: Path, counts: Mapping[PurePosixPath, int], labels: Labels) -> FolderGroups:
    """Group folders of images by class.

    counts: the images that lie directly in each folder, relative to the source; ROOT is the source itself.
    labels: "top": a class is a folder directly in the source with all that lies below it, as in torchvision's
    ImageFolder, and keeps its number also where it is empty; "parent": a class is a folder that images lie in; "none".
    "auto" is "top", or "none" where no folder holds images; it raises SourceError for a tree that can be read in two
    ways.
    """
    used = {folder: count for folder, count in counts.items() if count}
    if labels == "auto":
        labels = _only_reading(path, used)
    if labels == "none":
        return FolderGroups(None, None, dict.fromkeys(used), {})
    class_of = {
        folder: folder.parts[0] if labels == "top" else str(folder)
        for folder in (counts if labels == "top" else used)
        if folder.parts
    }
    if not used.keys() & class_of.keys():
        raise SourceError(f"{path}: --labels {labels} is given, but no folder in it holds images; leave it out")
    names = sorted(set(class_of.values()))
    label_of: dict[PurePosixPath, int | None] = {}
    class_counts = [0] * len(names)
    index = {name: label for label, name in enumerate(names)}
    for folder in used.keys() & class_of.keys():
        label = label_of[folder] = index[class_of[folder]]
        class_counts[label] += used[folder]
    return FolderGroups(names, class_counts, label_of, {BESIDE: used[ROOT]} if ROOT in used else {})


def group_archive(path: Path, counts: Mapping[PurePosixPath, int], labels: Labels) -> FolderGroups:
    """Group the folders of an archive by class, as group_by_class does below the folder that all of them lie in.

    A single folder of images is that folder, or a class in it where `labels` is "top" or "parent". An archive need not
    name empty folders, so they are no classes.
    """
    base = PurePosixPath(os.path.commonpath(list(map(str, counts))))
    base = base.parent if len(counts) == 1 and labels in ("top", "parent") else base
    groups = group_by_class(path, {folder.relative_to(base): count for folder, count in counts.items()}, labels)
    return replace(groups, label_of={base / folder: label for folder, label in groups.label_of.items()})


def _only_reading(path: Path, used: Mapping[PurePosixPath, int]) -> Labels:
    """Return "top" or "none"; raise SourceError, with the flag for each reading, if there are several."""
    tops = sorted({folder.parts[0] for folder in used if folder.parts})
    if not tops:
        return "none"
    beside, total = used.get(ROOT, 0), sum(used.values())
    top = f"--labels top for {count_classes(tops)}"
    none = f"--labels none for all {total} images without labels"
    if beside:
        raise SourceError(
            f"{path}: {beside} images lie beside folders of images such as {tops[0]}; give {top}, of the "
            f"{total - beside} images in folders, or {none}"
        )
    if len(tops) > 1 and SPLITS.issuperset(name.lower() for name in tops):
        one = f"give one of them, as {path / tops[0]}" if path.is_dir() else "pack each of them by itself"
        raise SourceError(
            f"{path}: {' and '.join(tops)} look like parts of one data set; {one}, or give {top}, or {none}"
        )
    if len(used) > len(tops) and not any(len(folder.parts) == 1 for folder in used):
        inside = f", or {path / tops[0]} for what lies in it" if len(tops) == 1 else ""
        raise SourceError(
            f"{path}: images lie in folders of folders, such as {min(used)}; give {top}, or --labels parent for "
            f"{count_classes(sorted(map(str, used)))}{inside}, or {none}"
        )
    return "top"


def count_classes(names: Sequence[str]) -> str:
    """Count classes and show the first and the last: "3 classes (cat to dog)"."""
    shown = f"{names[0]} to {names[-1]}" if len(names) > 2 else " and ".join(names)
    return f"{len(names)} class{'es' * (len(names) > 1)} ({shown})"
