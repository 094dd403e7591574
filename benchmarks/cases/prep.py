"""The timed conversions: image files to one .beton, in each mode, against FFCV's own writer.

Passthrough decodes every JPEG to check it, at an eighth of the size: most of its time is that entropy decoding.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.cases.photographs import draw
from benchmarks.harness import Absent, Case, Ready
from fastbyol.beton import Reader
from fastbyol.data_prep.convert import convert
from fastbyol.data_prep.settings import Mode, Settings
from fastbyol.data_prep.sources import open_source

DRAWN, WIDTH, HEIGHT = 100, 500, 375  # ImageNet's most common size
FILES = 1000  # at least; of 100, starting FFCV's processes would be the larger part of its time
# What FFCV's users write in place of each mode; it always encodes anew, so passthrough has JPEG for its rival.
FFCV_MODES: dict[Mode, str] = {"passthrough": "jpg", "jpeg": "jpg", "raw": "raw", "proportion": "proportion"}


def cases(source: Path | None, *, name: str | None, workers: int, max_side: int = 500) -> Iterator[Case]:
    """Convert the images of a source, or drawn ones, from a flat folder of files on both sides."""
    folder = tempfile.TemporaryDirectory()
    count = _lay_out(source, Path(folder.name))
    shown = name or (source.name if source else f"drawn {WIDTH}x{HEIGHT}")
    for mode in FFCV_MODES:
        shape = f"{mode}, {count} images of {shown}, max side {max_side}, {workers} workers"
        for writer, prepare in (("fastbyol", _ours), ("ffcv", _ffcv)):
            ready = partial(prepare, folder, mode, workers=workers, max_side=max_side)
            yield Case("prep", shape, writer, ready, images=count, dtype="uint8")


def _lay_out(source: Path | None, folder: Path) -> int:
    """Write the images as files, in the order of the source, over again up to FILES; return their number."""
    (folder / "images").mkdir()
    files = (
        (sample.read() for sample in open_source(source))
        if source
        else (draw(seed, WIDTH, HEIGHT) for seed in range(DRAWN))
    )
    count = 0
    for data in files:
        (folder / "images" / f"{count:06}.jpg").write_bytes(data)
        count += 1
    for number in range(count, FILES):
        shutil.copy(folder / "images" / f"{number % count:06}.jpg", folder / "images" / f"{number:06}.jpg")
    return max(count, FILES)


def _ours(folder: tempfile.TemporaryDirectory[str], mode: Mode, *, workers: int, max_side: int) -> Ready:
    source = open_source(Path(folder.name) / "images")
    out = Path(folder.name) / f"{mode}.beton"
    settings = Settings(mode, max_side=max_side)

    def write() -> None:
        convert(source, out, settings, workers=workers, overwrite=True)

    return Ready(write, partial(_check, write, out, source.count))


def _ffcv(folder: tempfile.TemporaryDirectory[str], mode: Mode, *, workers: int, max_side: int) -> Ready:
    try:
        from ffcv.fields import RGBImageField  # noqa: PLC0415  # an extra, hard to install
        from ffcv.writer import DatasetWriter  # noqa: PLC0415
    except ImportError as error:
        raise Absent(f"ffcv is not installed ({error})") from error
    files = sorted((Path(folder.name) / "images").iterdir())
    out = Path(folder.name) / f"ffcv-{mode}.beton"

    def write() -> None:
        image = RGBImageField(write_mode=FFCV_MODES[mode], max_resolution=max_side, jpeg_quality=90)
        DatasetWriter(str(out), {"image": image}, num_workers=workers).from_indexed_dataset(_Files(files))

    return Ready(write, partial(_check, write, out, len(files)))


class _Files:
    """Image files as a data set for FFCV's writer: indexed, decoded by Pillow."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any]:
        with Image.open(self._files[index]) as image:
            return (image.convert("RGB"),)


def _check(write: Callable[[], None], path: Path, count: int) -> None:
    """Raise unless what is written holds every image."""
    write()
    with Reader(path) as reader:
        assert len(reader) == count, f"{len(reader)} of {count} images were written"
