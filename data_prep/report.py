"""What fastbyol-prep write prints at its end: what was written, and what was left out or repaired."""

from __future__ import annotations

import argparse

from fastbyol.beton import UNLABELLED, Reader
from fastbyol.data_prep.convert import ConversionResult
from fastbyol.data_prep.formats import describe_ignored
from fastbyol.data_prep.settings import SMALL_SIDE
from fastbyol.data_prep.sources.base import Source
from fastbyol.data_prep.sources.classes import count_classes


def report(arguments: argparse.Namespace, source: Source, done: ConversionResult, *, seconds: float) -> None:
    """Print what was written, and what was left out."""
    names = source.class_names
    classes = count_classes(names) if names else "no labels"
    print(
        f"{arguments.out}: {done.written} images, {classes}, {arguments.out.stat().st_size / 1e6:.1f} MB in "
        f"{seconds:.1f} s ({(done.written + len(done.skipped)) / seconds:.0f} images/s)"
    )
    with Reader(arguments.out) as reader:
        unlabelled = 0 if reader.labels is None else int((reader.labels == UNLABELLED).sum())
    if unlabelled:
        print(f"{unlabelled} of {done.written} images have no label: training takes them, scores leave them out")
    if source.ignored:
        print(f"ignored {describe_ignored(source.ignored)}")
    if names and source.class_counts and 0 in source.class_counts and arguments.classes_from is None:
        empty = [name for name, count in zip(names, source.class_counts, strict=True) if not count]
        print(f"without images, but with a number: {count_classes(empty)}")
    if done.lossless_as_jpeg is not None:
        print(
            f"lossless images above {SMALL_SIDE} px, such as {done.lossless_as_jpeg}, became JPEG of quality "
            f"{arguments.quality}; --mode raw keeps their pixels, for 3 bytes each"
        )
    if done.repaired:
        name, reason = done.repaired[0]
        print(f"repaired {len(done.repaired)} images, listed in {arguments.out}.json; the first: {name}: {reason}")
    if done.skipped:
        name, reason = done.skipped[0]
        print(f"skipped {len(done.skipped)} bad images, listed in {arguments.out}.json; the first: {name}: {reason}")
