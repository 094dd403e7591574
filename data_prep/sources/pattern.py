"""Patterns of file names: braces as in shard-{0000..0099}.tar or {a,b}.tar, and * ? [ ]."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from fastbyol.data_prep.sources.base import SourceError

FILES_MAX = 1 << 20
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def expand_pattern(pattern: str) -> list[Path]:
    """List the files of a pattern: those of a brace in its order, those of a * sorted; [] if there is no match.

    Raises SourceError if a file of a brace does not exist, so that a missing shard is noticed.
    """
    names = list(itertools.islice(expand_braces(pattern), FILES_MAX + 1))
    if len(names) > FILES_MAX:
        raise SourceError(f"{pattern}: matches more than {FILES_MAX} files; give fewer")
    if names == [pattern] and not glob.has_magic(pattern):
        return []
    found: list[Path] = []
    for name in names:
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207 - absolute and relative
        missing = [each for each in matches or [name] if not Path(each).exists()]
        if missing:
            raise SourceError(f"{pattern}: {missing[0]} does not exist; copy it, or correct the pattern")
        found += map(Path, matches)
    return found


def expand_braces(text: str) -> Iterator[str]:
    """Expand braces as a shell does; braces without a comma or a range stay as they are."""
    for brace in BRACES.finditer(text):
        parts = list(_parts(brace[1]))
        if parts:
            for part in itertools.chain.from_iterable(parts):
                yield from expand_braces(f"{text[: brace.start()]}{part}{text[brace.end() :]}")
            return
    yield text


def _parts(inside: str) -> Iterator[Iterator[str]]:
    """Yield the alternatives of a brace: a range of numbers, zero-padded if an end is, or a list."""
    if ends := RANGE.fullmatch(inside):
        first, last = int(ends[1]), int(ends[2])
        step = 1 if last >= first else -1
        is_padded = any(end.startswith("0") and len(end) > 1 for end in ends.groups())
        width = max(map(len, ends.groups())) if is_padded else 0
        yield (f"{number:0{width}}" for number in range(first, last + step, step))
    elif "," in inside:
        yield iter(inside.split(","))
