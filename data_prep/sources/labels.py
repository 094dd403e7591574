"""Classes from the labels in shards and tables (all numbers, all names, or none), and the label map of another file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fastbyol.beton import UNLABELLED, BetonError, Reader
from fastbyol.data_prep.sources.base import Sample, Source, SourceError

NUMBER_MAX = 1 << 20  # far above any data set: a label of n needs n + 1 class names


class LabelCounter:
    """A counter of the labels of a source, from which its classes follow.

    `declared` are the source's own names of the numbers; without them a number is named by its digits.
    """

    def __init__(self, path: Path, declared: Sequence[str] | None = None) -> None:
        self._path = path
        self._declared = declared
        self._counts: Counter[int | str | None] = Counter()
        self._first: dict[type, str] = {}

    def add(self, label: object, sample: str, *, count: int = 1) -> None:
        """Count a label; raise SourceError if it is not a whole number, a name or None."""
        if label in (UNLABELLED, ""):  # -1 in test splits on the Hugging Face hub
            label = None
        is_label = label is None or (isinstance(label, (int, str)) and not isinstance(label, bool))
        wanted = "a whole number or a name; name another with --label-column"
        self._require(is_label, f"label of {sample} is {label!r:.60}; wanted {wanted}")
        highest = NUMBER_MAX if self._declared is None else len(self._declared)
        in_range = not isinstance(label, int) or 0 <= label < highest
        self._require(in_range, f"label of {sample} is {label}; wanted 0 to {highest - 1}")
        self._first.setdefault(type(label), sample)
        assert label is None or isinstance(label, (int, str))
        self._counts[label] += count

    def classes(self) -> tuple[list[str] | None, list[int] | None]:
        """Return the name and the number of images of each class, by label; None twice if nothing is labelled."""
        kinds = [kind for kind in (int, str) if kind in self._first]
        if not kinds:
            return None, None
        self._require(
            len(kinds) == 1,
            f"{self._first.get(int)} has a number as label, {self._first.get(str)} a name; give one kind of label",
        )
        if kinds == [str]:
            names = sorted(str(label) for label in self._counts if label is not None)
            return names, [self._counts[name] for name in names]
        numbers = range(1 + max(int(label or 0) for label in self._counts))
        names = [str(number) for number in numbers] if self._declared is None else list(self._declared)
        return names, [self._counts[label] for label in range(len(names))]

    def _require(self, claim: bool, fault: str) -> None:
        if not claim:
            raise SourceError(f"{self._path}: {fault}")


def label_index(names: Sequence[str] | None) -> dict[object, int | None]:
    """Map every value a sample may carry, a number or a class name, to its label."""
    index: dict[object, int | None] = {}
    for label, name in enumerate(names or ()):
        index[name] = index[label] = label
    return index


def read_class_names(path: Path) -> list[str]:
    """Read the class names of a .beton, its .json sidecar or a .json list; raise SourceError if there are none."""
    try:
        if path.suffix != ".json":
            with Reader(path) as reader:
                found: object = reader.class_names
        else:
            found = json.loads(path.read_bytes())
            found = found.get("class_names") if isinstance(found, dict) else found
    except BetonError as error:
        raise SourceError(str(error)) from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error}); give a .beton, its .json, or a list of names") from error
    if not (isinstance(found, list) and found and all(isinstance(name, str) for name in found)):
        raise SourceError(f"{path}: no class names in it; give a labelled .beton, its .json, or a list of names")
    if len(set(found)) < len(found):
        twice = next(name for name, count in Counter(found).items() if count > 1)
        raise SourceError(f"{path}: two classes are named {twice!r}; give each class its own name")
    return found


class RelabelledSource:
    """A source with the labels of another file; classes are matched by name, and may be missing in the source."""

    def __init__(self, source: Source, class_names: list[str], *, origin: Path) -> None:
        if source.class_names is None or source.class_counts is None:
            raise SourceError(
                f"{source.path}: its images have no labels, to be numbered as in {origin}; give labelled ones"
            )
        of_name = {name: label for label, name in enumerate(class_names)}
        here = list(zip(source.class_names, source.class_counts, strict=True))
        unknown = [name for name, count in here if count and name not in of_name]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            are = "are" if more else "is"
            remedy = "give a file with all classes, or leave out --classes-from"
            raise SourceError(f"{source.path}: class {unknown[0]!r}{more} {are} not in {origin}; {remedy}")
        self._source = source
        self._new_label = [of_name.get(name) for name in source.class_names]
        self.path, self.count, self.ignored = source.path, source.count, source.ignored
        self.class_names: list[str] | None = class_names
        count_of = dict(here)
        self.class_counts: list[int] | None = [count_of.get(name, 0) for name in class_names]

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._source:
            yield replace(sample, label=None if sample.label is None else self._new_label[sample.label])


class UnlabelledSource:
    """A source without its labels."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path, self.count, self.ignored = source.path, source.count, source.ignored
        self.class_names: list[str] | None = None
        self.class_counts: list[int] | None = None

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._source:
            yield replace(sample, label=None)
