"""The JPEGs that loaders are timed on: those of a source, or drawn ones, as .beton files of several sizes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.harness import Absent
from fastbyol.beton import Reader
from fastbyol.order import Rows, stream

SIDES_PX = {"256 px": 256, "500 px": 500, "original size": 4096}  # at most, the longer; the last are not encoded anew
IMAGES_MAX = 1000  # of a source, spread evenly over it
DRAWN, DRAWN_PX = 50, (640, 480)


class Photographs:
    """Images of a source or a .beton, or drawn ones if neither is given; written on first use."""

    def __init__(self, source: Path | None, name: str | None) -> None:
        self.source = source
        self.name = name or (source.name if source else "drawn images")
        self.is_beton = source is not None and source.suffix == ".beton"
        self.sizes = ("as stored",) if self.is_beton else tuple(SIDES_PX)
        self._folder = tempfile.TemporaryDirectory()
        self._readers: dict[str, Reader] = {}

    def reader(self, size: str) -> Reader:
        """Open the images at this size; raise Absent where what encodes them is not installed."""
        if size not in self._readers:
            try:
                path = self.source if self.source and self.is_beton else self._write(size)
            except ImportError as error:
                raise Absent(f"the codecs of fastbyol are not installed ({error})") from error
            self._readers[size] = Reader(path)
        return self._readers[size]

    def _write(self, size: str) -> Path:
        from fastbyol.data_prep.convert import convert  # noqa: PLC0415  # its codecs may be missing beside a bare torch
        from fastbyol.data_prep.settings import Settings  # noqa: PLC0415
        from fastbyol.data_prep.sources import open_source  # noqa: PLC0415

        folder = Path(self._folder.name)
        source = self.source or folder / "drawn"
        if not source.exists():
            source.mkdir()
            for number in range(DRAWN):
                (source / f"{number:03}.jpg").write_bytes(draw(number, *DRAWN_PX))
        path = folder / f"{size.replace(' ', '-')}.beton"
        settings = Settings("passthrough" if size == "original size" else "jpeg", max_side=SIDES_PX[size])
        convert(open_source(source), path, settings, workers=2, on_error="skip", limit=IMAGES_MAX)
        return path


@dataclass(frozen=True)
class Job:
    """The images of one run, its batch size, its number of threads and its device."""

    photographs: Photographs
    size: str
    threads: int
    batch_size: int
    batches: int
    device: str

    @property
    def images(self) -> int:
        """Count the images of a run."""
        return self.batches * self.batch_size

    def reader(self) -> Reader:
        """Open the file."""
        return self.photographs.reader(self.size)

    def stream(self) -> Iterator[Rows]:
        """Order the batches, without end, as training does."""
        return stream(0, batch_size=self.batch_size, count=len(self.reader()), seed=0)

    def rows(self) -> list[Rows]:
        """Order the batches of a run."""
        return list(islice(self.stream(), self.batches))


def draw(seed: int, width: int, height: int) -> bytes:
    """Draw a JPEG of about a photograph's bytes: noise of several scales."""
    from PIL import Image  # noqa: PLC0415  # may be missing beside a bare torch

    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells, contrast in ((4, 60), (16, 40), (64, 25), (250, 12)):
        grid = rng.normal(0, contrast, (cells, cells, 3)).clip(-127, 127) + 128
        layer = Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        image += np.asarray(layer, np.float64) - 128
    stream_ = io.BytesIO()
    Image.fromarray((image + 128).clip(0, 255).astype(np.uint8)).save(stream_, "JPEG", quality=92)
    return stream_.getvalue()
