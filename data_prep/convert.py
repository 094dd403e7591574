"""Conversion of a source to a .beton: images are encoded in parallel and appended in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

from fastbyol.beton import JPEG, StoredImage
from fastbyol.data_prep import reuse
from fastbyol.data_prep.formats import LOSSLESS, ImageError, format_of
from fastbyol.data_prep.images import prepare
from fastbyol.data_prep.jpegs import SOI
from fastbyol.data_prep.parallel import map_ordered
from fastbyol.data_prep.pixels import pillow_limits
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.sources.base import Sample, Source, SourceError
from fastbyol.data_prep.writer import Writer

OnError = Literal["fail", "skip", "keep"]
ON_ERROR: tuple[OnError, ...] = ("fail", "skip", "keep")
BAD_SHOWN = 20


class BadImages(ValueError):
    """Images that cannot be stored; the message names the first and counts them all; `listed` has a line for each."""

    def __init__(self, source: Source, bad: list[tuple[str, str]]) -> None:
        (name, reason), more = bad[0], f", and {len(bad) - 1} more of {source.count}" if len(bad) > 1 else ""
        super().__init__(
            f"{source.path}: {name}: {reason}{more}; repair {'them' if more else 'it'}, or give --on-error skip"
        )
        self.listed = [f"{name}: {reason}" for name, reason in bad[:BAD_SHOWN]] if more else []


@dataclass(frozen=True)
class ConversionResult:
    """The number of images written, and (name, reason) of each image left out, and of each repaired.

    lossless_as_jpeg: the name of a lossless image that mode "auto" stored as JPEG, None without one.
    """

    written: int
    skipped: list[tuple[str, str]]
    repaired: list[tuple[str, str]]
    lossless_as_jpeg: str | None


class _Prepared(NamedTuple):
    """One sample, encoded or refused, what was repaired, and whether mode "auto" made a JPEG of a lossless image."""

    sample: Sample
    image: StoredImage | ImageError
    notes: list[str]
    loses_pixels: bool = False


def convert(  # noqa: PLR0913 - all by name
    source: Source,
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    workers: int,
    on_error: OnError = "fail",
    limit: int | None = None,
    overwrite: bool = False,
    key: str | None = None,
    address_digest: str | None = None,
) -> ConversionResult:
    """Write the source's images to a .beton, whose bytes do not depend on `workers`.

    `limit` takes that many images evenly spaced over the source, so that every class is represented. Bad images raise
    BadImages once all are read ("fail"), are left out ("skip"), or kept as far as they decode ("keep"); what was left
    out or repaired is recorded in the sidecar. `key` identifies the samples and all settings: after a kill the
    conversion with the same key goes on where that one was, to the same bytes. `address_digest` stands in the sidecar
    for the whole address of a source that was fetched, which has no password or signature there.
    """
    total = min(limit or source.count, source.count)
    writer = Writer(
        out,
        capacity=total,
        class_names=source.class_names,
        page_bytes=settings.page_bytes,
        overwrite=overwrite,
        key=key,
    )
    encode = partial(_prepare_sample, settings=replace(settings, keeps_damaged=on_error == "keep"))
    bad: list[tuple[str, str]] = []  # that end the conversion
    lossless_as_jpeg: str | None = None
    with writer, pillow_limits(settings.max_pixels):
        left = islice(_evenly_spaced(source, total), writer.taken, None)
        # The threads stop before the writer removes its unfinished file.
        with closing(map_ordered(encode, left, workers=workers, total=total, done=writer.taken)) as stored:
            for sample, image, notes, loses_pixels in stored:
                if isinstance(image, StoredImage):
                    if loses_pixels:
                        lossless_as_jpeg = lossless_as_jpeg or sample.name
                    if not bad:
                        writer.append(image, label=sample.label, name=sample.name, notes=notes)
                elif on_error == "fail":
                    bad.append((sample.name, str(image)))
                else:
                    writer.skip(sample.name, str(image))
        if bad:
            raise BadImages(source, bad)
        writer.facts = {
            "source": str(source.path),
            **({} if address_digest is None else {"address_digest": address_digest}),
            "settings": {**settings.facts(), "limit": limit},
            "found": source.count,
            "ignored": source.ignored.total(),
            "ignored_by_kind": dict(source.ignored),
            **({} if key is None else {reuse.KEY: key}),
            "skipped": [{"name": name, "reason": reason} for name, reason in writer.skipped],
            "repaired": [{"name": name, "reason": reason} for name, reason in writer.repaired],
        }
        return ConversionResult(len(writer), writer.skipped, writer.repaired, lossless_as_jpeg)


def _prepare_sample(sample: Sample, settings: Settings) -> _Prepared:
    """Read and encode one sample; keep its error instead of raising it."""
    notes: list[str] = []
    try:
        data = sample.read()
        image = prepare(data, settings, name=sample.name, notes=notes)
    except ImageError as error:
        return _Prepared(sample, error, [])
    except OSError as error:
        return _Prepared(sample, ImageError(f"cannot be read: {error.strerror or error}"), [])
    may_lose = settings.mode == "auto" and image.mode == JPEG and data[:2] != SOI
    return _Prepared(sample, image, notes, may_lose and format_of(data, sample.name) in LOSSLESS)


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
