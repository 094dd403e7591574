"""Know the loaders that are timed: batches decoded from a .beton file, each image once."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.harness import Absent, Case, Ready
from fastbyol.beton import JPEG, Reader, StoredImage
from fastbyol.order import stream

BATCHES = 20  # a run
DRAWN = 512  # demo images, where no file is given


def cases(data: Path | None, *, batch_size: int, workers: int) -> Iterator[Case]:
    """Decode batches of a file, or of a small one drawn for the purpose."""
    yield Case(
        "loader",
        f"{data.name if data else 'demo set'}, batch {batch_size}, {workers} workers",
        "native",
        partial(_native, data, batch_size=batch_size, workers=workers),
        images=BATCHES * batch_size,
        dtype="uint8",
    )


def _native(data: Path | None, *, batch_size: int, workers: int) -> Ready:
    try:
        from fastbyol.loaders.native import load  # noqa: PLC0415  # its JPEG codec may be missing beside a bare torch
    except ImportError as error:
        raise Absent(f"the native loader's codec is not installed ({error})") from error

    with tempfile.TemporaryDirectory() as folder:  # an open file outlives its name
        reader = Reader(data or _drawn(Path(folder)))
    batches = load(reader, stream(0, batch_size=batch_size, count=len(reader), seed=0), workers=workers)
    return Ready(lambda: list(itertools.islice(batches, BATCHES)))


def _drawn(folder: Path) -> Path:
    import simplejpeg  # noqa: PLC0415

    from fastbyol.data_prep import demo  # noqa: PLC0415
    from fastbyol.data_prep.writer import Writer  # noqa: PLC0415

    path = folder / "demo.beton"
    images, _ = demo.draw(DRAWN, seed=0, split="train")
    with Writer(path, capacity=DRAWN, class_names=None) as writer:
        for image in images:
            height, width, _ = image.shape
            writer.append(StoredImage(JPEG, width, height, simplejpeg.encode_jpeg(image, quality=90)))
    return path
