"""Thumbnails of images as sheets: JPEGs of at most 1024 pixels a side that hold many of them in rows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol import jpeg
from fastbyol.beton import JPEG, Reader
from fastbyol.system.progress import Progress

SIDES = (192, 128, 96, 64, 48, 32)  # multiples of 16: no block of a JPEG has pixels of two thumbnails
SHEET_PX = 1024
SAMPLE = 256  # thumbnails from which the bytes of one are measured
PIXEL_BYTES = 0.4  # of a sheet's JPEG, as photographs take


class Sheets(NamedTuple):
    """JPEGs of thumbnails of `px` pixels, `per_row` by `per_row` of them, and the number of thumbnails."""

    jpegs: list[bytes]
    px: int
    per_row: int
    thumbnails: int


def choose_px(reader: Reader, samples: NDArray[np.int64], *, budget: float) -> int:
    """Choose the largest side with which all thumbnails take about `budget` bytes, but none above the images' own."""
    own = float(np.median(np.minimum(reader.widths[samples], reader.heights[samples])))
    useful = [px for px in SIDES if px < 1.5 * own] or [SIDES[-1]]
    return next((px for px in useful if len(samples) * px * px * PIXEL_BYTES <= budget), useful[-1])


def bytes_each(reader: Reader, samples: NDArray[np.int64], px: int) -> float:
    """Measure what a thumbnail takes, on the average of a few samples."""
    pixels = np.stack([thumbnail(reader, sample, px) for sample in samples.tolist()])
    return 1.03 * len(_encode(pixels, 1)) / len(samples)


def draw(reader: Reader, samples: NDArray[np.int64], px: int, *, budget: float, workers: int) -> Sheets:
    """Draw thumbnails of the samples' centre squares, in their order, in sheets until `budget` bytes are full."""
    per_row = SHEET_PX // px
    jpegs: list[bytes] = []
    taken, count = 0, 0
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress(total=len(samples), desc="thumbnails", unit="images") as bar,
    ):
        for part in _parts(samples, per_row * per_row):
            pixels = np.stack(list(pool.map(lambda sample: thumbnail(reader, sample, px), part.tolist())))
            sheet = _encode(pixels, per_row)
            taken += len(sheet)
            if taken > budget and jpegs:
                break
            jpegs.append(sheet)
            count += len(part)
            bar.update(len(part))
    return Sheets(jpegs, px, per_row, count)


def _parts(samples: NDArray[np.int64], length: int) -> Iterator[NDArray[np.int64]]:
    return (samples[first : first + length] for first in range(0, len(samples), length))


def thumbnail(reader: Reader, sample: int, px: int) -> NDArray[np.uint8]:
    """Scale the centre square of an image to [px, px, 3], smoothed as it shrinks."""
    from PIL import Image  # noqa: PLC0415 - so that the command can report in one line that Pillow is missing
    from PIL.JpegImagePlugin import JpegImageFile  # noqa: PLC0415 - as above

    width, height = int(reader.widths[sample]), int(reader.heights[sample])
    image: Image.Image
    if reader.modes[sample] == JPEG:
        image = JpegImageFile(io.BytesIO(reader.payload(sample)))  # not Image.open, which has a limit of its own
        least = 2 * px / min(width, height)
        image.draft("RGB", (int(least * width), int(least * height)))
    else:
        image = Image.frombytes("RGB", (width, height), bytes(reader.payload(sample)))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((px, px), Image.Resampling.LANCZOS, box))


def _encode(pixels: NDArray[np.uint8], per_row: int) -> bytes:
    """Encode thumbnails [n, px, px, 3] as one sheet."""
    count, px = pixels.shape[:2]
    rows = -(-count // per_row)
    sheet = np.zeros((rows * per_row, px, px, 3), np.uint8)
    sheet[:count] = pixels
    whole = sheet.reshape(rows, per_row, px, px, 3).swapaxes(1, 2).reshape(rows * px, per_row * px, 3)
    is_small = px <= SIDES[-2]
    return jpeg.encode(
        np.ascontiguousarray(whole), quality=88 if is_small else 80, subsampling="444" if is_small else "420"
    )
