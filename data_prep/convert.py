"""Know how a source becomes a .beton: read and encode in parallel, append in order, account for every image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fastbyol.beton import StoredImage
from fastbyol.data_prep.images import ImageError, store
from fastbyol.data_prep.parallel import map_ordered
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.sources.source import Sample, Source, SourceError
from fastbyol.data_prep.writer import Writer

OnError = Literal["fail", "skip"]


@dataclass(frozen=True)
class Converted:
    """Count what became of a source's images; `skipped` holds name and reason of each bad one."""

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
) -> Converted:
    """Write the source's images to a .beton; the bytes do not depend on `workers`.

    `limit` takes that many images spread evenly over the source, so that every class is among them. A bad image raises
    ImageError that names it, or is skipped and recorded in the sidecar.
    """
    total = min(limit or source.count, source.count)
    skipped: list[tuple[str, str]] = []
    writer = Writer(
        out, capacity=total, class_names=source.class_names, page_bytes=settings.page_bytes, overwrite=overwrite
    )
    encode = partial(_store, settings=settings)
    stored = map_ordered(encode, _spread(source, total), workers=workers, total=total)
    # The threads stop before the writer discards what they were filling.
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
            "ignored": source.ignored,
            "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        }
        return Converted(len(writer), skipped)


def _store(sample: Sample, settings: Settings) -> tuple[Sample, StoredImage | ImageError | OSError]:
    """Read and encode one sample; return what is wrong with it instead of raising."""
    try:
        return sample, store(sample.read(), settings)
    except (ImageError, OSError) as error:
        return sample, error


def _spread(source: Source, total: int) -> Iterator[Sample]:
    """Yield total samples at even distances; raise SourceError where the source has changed since it was listed."""
    seen = 0
    for place, sample in enumerate(source):
        seen = place + 1
        if seen * total // source.count > place * total // source.count:
            yield sample
    if seen != source.count:
        raise SourceError(
            f"{source.path}: {source.count} images were listed and {seen} came; leave it alone and run again"
        )
