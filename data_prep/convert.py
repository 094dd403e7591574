"""Conversion of a source to a .beton: images are encoded in parallel and appended in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from fastbyol.beton import StoredImage
from fastbyol.data_prep.images import ImageError, prepare
from fastbyol.data_prep.parallel import map_ordered
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.sources.base import Sample, Source, SourceError
from fastbyol.data_prep.writer import Writer

OnError = Literal["fail", "skip"]


@dataclass(frozen=True)
class ConversionResult:
    """The number of images written, and the name and the reason of each skipped one."""

    written: int
    skipped: list[tuple[str, str]]


def convert(
    source: Source,
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    workers: int,
    on_error: OnError = "fail",
    limit: int | None = None,
    overwrite: bool = False,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> ConversionResult:
    """Write the source's images to a .beton, whose bytes do not depend on `workers`.

    `limit` takes that many images evenly spaced over the source, so that every class is represented. A bad image raises
    ImageError with its name, or is skipped and recorded in the sidecar, beside `facts`.
    """
    total = min(limit or source.count, source.count)
    skipped: list[tuple[str, str]] = []
    writer = Writer(
        out, capacity=total, class_names=source.class_names, page_bytes=settings.page_bytes, overwrite=overwrite
    )
    encode = partial(_prepare_sample, settings=settings)
    stored = map_ordered(encode, _evenly_spaced(source, total), workers=workers, total=total)
    # The threads stop before the writer removes its unfinished file.
    with writer, closing(stored):
        for sample, image in stored:
            if isinstance(image, StoredImage):
                writer.append(image, label=sample.label)
            elif on_error == "skip":
                skipped.append((sample.name, str(image)))
            else:
                raise ImageError(f"{source.path}: {sample.name}: {image}; repair it or give --on-error skip") from image
        writer.facts = {
            "source": str(source.path),
            "settings": {**settings.facts(), "limit": limit},
            "found": source.count,
            "ignored": source.ignored.total(),
            "ignored_by_kind": dict(source.ignored),
            **facts,
            "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        }
        return ConversionResult(len(writer), skipped)


def _prepare_sample(sample: Sample, settings: Settings) -> tuple[Sample, StoredImage | ImageError | OSError]:
    """Read and encode one sample; return its error instead of raising it."""
    try:
        return sample, prepare(sample.read(), settings)
    except (ImageError, OSError) as error:
        return sample, error


def _evenly_spaced(source: Source, total: int) -> Iterator[Sample]:
    """Yield `total` evenly spaced samples; raise SourceError if the source has changed since it was listed."""
    seen = 0
    for place, sample in enumerate(source):
        seen = place + 1
        if seen * total // source.count > place * total // source.count:
            yield sample
    if seen != source.count:
        raise SourceError(
            f"{source.path}: {source.count} images were listed but {seen} were read; run again while nothing changes it"
        )
