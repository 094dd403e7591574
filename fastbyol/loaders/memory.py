"""Loader memory: every image decoded once and held as uint8 in RAM or on the GPU."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.errors import ConfigError
from fastbyol.loaders import native
from fastbyol.loaders.batch import PREFETCH, Batch, Packing, max_batch_bytes, pack
from fastbyol.loaders.resized import ResizedReader, stored_in_file
from fastbyol.order import Rows
from fastbyol.system.limits import available_bytes

RAM_SHARE = 0.9  # of what is available
GPU_SHARE = 0.5  # of what is free before training, which needs the rest
GATHERED = 2  # batches in pinned buffers, where the file does not fit on the GPU: the one in use, and the next
SIDE_MIN = 32  # pixels, the least that is proposed
GIB = 2**30

log = logging.getLogger(__name__)


def load(
    reader: Reader,
    batches: Iterable[Rows],
    *,
    workers: int,
    prefetch: int = PREFETCH,
    on_error: str = "fail",
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> Generator[Batch, None, None]:
    """Yield the batches in the given order; a sample is decoded, as by loader native, on first use, and then held.

    The pixels stay on `device` if they fit there; a batch is then the whole buffer with the offsets of its images, and
    nothing is copied. Otherwise they stay in RAM, and a batch for a GPU is gathered into a pinned buffer. They stay as
    long as the reader lives, for every later load with the same reader. A ResizedReader's images are held at its sizes.
    Raises ConfigError at once, before anything is decoded, where the samples fit neither on the device nor in RAM, with
    the side that would fit; processes: the number that hold as much RAM each.
    """
    source = iter(batches)
    first = next(source, None)
    rows = source if first is None else chain([first], source)
    target, by_device = torch.device(device), DECODED_FILES.get(reader, {})
    if target not in by_device:
        decoded = _DecodedFile(reader, target)
        batch_size = 1 if first is None else len(first.indices)
        decoded.allocate(reader, batch_size=batch_size, prefetch=prefetch, processes=processes)
        by_device = DECODED_FILES.setdefault(reader, by_device)
        by_device[target] = decoded
    return _serve(by_device[target], reader, iter(rows), workers=workers, prefetch=prefetch, on_error=on_error)


def side_that_fits(reader: Reader, fits: Callable[[Reader], bool]) -> int | None:
    """Return the longest short side, in pixels, at which a file's images fit; None where SIDE_MIN does not.

    fits: tells whether the images of a reader fit; where they do, smaller ones must, too.
    """
    stored = stored_in_file(reader)
    sides = range(SIDE_MIN, int(np.minimum(stored.heights, stored.widths).max()) + 1)
    fitting = bisect_left(sides, True, key=lambda side: not fits(ResizedReader(stored, side)))
    return sides[fitting - 1] if fitting else None


def decoding_threads(reader: Reader, *, workers: int) -> int | None:  # noqa: ARG001
    """Return None: once every sample is decoded, more threads do not help."""
    return None


def _serve(
    file: _DecodedFile, reader: Reader, batches: Iterator[Rows], *, workers: int, prefetch: int, on_error: str
) -> Generator[Batch, None, None]:
    """Decode the samples that no earlier batch has used, until all are there; then only serve."""
    waiting: deque[tuple[Rows, Rows]] = deque()
    is_requested = file.available(on_error)  # of this generator: another may have stopped before its samples came

    def missing() -> Iterator[Rows]:
        while not is_requested.all() and (rows := next(batches, None)) is not None:
            new = np.unique(rows.indices[~is_requested[rows.indices]])  # in the order of the file
            is_requested[new] = True
            waiting.append((rows, Rows(new, np.zeros_like(new))))
            yield waiting[-1][1]

    native_batches = native.load(
        reader, missing(), workers=workers, prefetch=prefetch, on_error=on_error, device=file.place
    )
    with closing(native_batches) as decoded:
        for batch in decoded:
            rows, new = waiting.popleft()
            file.store(new, batch)
            del batch
            yield file.batch(reader, rows)
    for rows in batches:
        yield file.batch(reader, rows)


class _DecodedFile:
    """The decoded samples of a file, for batches on `device`. It holds no reader, because the reader owns it.

    place: the device of the pixels; packing: where each sample lies; sources: int64 [N], the sample itself or, where it
    does not decode, its stand-in; is_decoded: bool [N].
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.device, self.place = device, device
        self.packing = _pack_all(reader)
        self.sources = self.packing.rows.indices.copy()
        self.is_decoded = np.zeros(len(reader), bool)
        self.has_one_size = bool((self.packing.sizes == self.packing.sizes[0]).all())

    def allocate(self, reader: Reader, *, batch_size: int, prefetch: int, processes: int) -> None:
        """Allocate the pixels on the device, else on the host; raise ConfigError where they fit on neither."""
        size = self.packing.buffer_bytes()
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if size <= GPU_SHARE * free:
                self.pixels = torch.empty(size, dtype=torch.uint8, device=self.device)
                return
            log.warning(
                "%s decoded takes %.1f GiB, more than %.0f %% of the %.1f GiB free on %s: it stays in RAM%s",
                *(reader.path, size / GIB, 100 * GPU_SHARE, free / GIB, self.device, gpu_advice(reader, free=free)),
            )
            self.place = torch.device("cpu")
        is_gathered, available = self.place != self.device, available_bytes()

        def beside(reader: Reader, size: int) -> int:
            """Return the most bytes that decoding takes beside the decoded samples, of which each is decoded once."""
            decoding = min(native.max_load_bytes(reader, batch_size=batch_size, prefetch=prefetch), size)
            return decoding + (GATHERED * max_batch_bytes(reader, batch_size=batch_size) if is_gathered else 0)

        def fits(reader: Reader) -> bool:
            size = _pack_all(reader).buffer_bytes()
            return processes * (size + beside(reader, size)) <= RAM_SHARE * available

        if not fits(reader):
            each, side = "" if processes == 1 else f" in each of {processes} processes", side_that_fits(reader, fits)
            proposed = "" if side is None else f"or --memory-side {side}, at which it fits, "
            raise ConfigError(
                f"{reader.path} decoded takes {size / GIB:.1f} GiB, and decoding it up to "
                f"{beside(reader, size) / GIB:.1f} GiB more{each}; loader memory uses up to {RAM_SHARE:.0%} of the "
                f"{available / GIB:.1f} GiB of RAM that are available; give --loader native, {proposed}or write "
                "smaller images"
            )
        self.pixels = self.packing.empty()

    def available(self, on_error: str) -> NDArray[np.bool_]:
        """Return which samples need no decoding, bool [N]; under "fail" a bad sample is not one of them."""
        if on_error == "fail":
            is_good: NDArray[np.bool_] = self.sources == np.arange(len(self.sources))
            return np.logical_and(self.is_decoded, is_good)
        return self.is_decoded.copy()

    def store(self, requested: Rows, batch: Batch) -> None:
        """Copy decoded images, stand-ins included, to their places."""
        self.sources[requested.indices] = batch.indices
        packing, pixels = self.packing, self.pixels
        for index, first in zip(batch.indices.tolist(), batch.offsets.tolist(), strict=True):
            begin, end = int(packing.begins[index]), int(packing.ends[index])
            image = batch.pixels[first : first + end - begin]
            if pixels.is_cuda:
                pixels[begin:end].copy_(image, non_blocking=True)
            else:  # torch would split each image among its threads
                np.copyto(pixels[begin:end].numpy(), image.numpy())
        self.is_decoded[requested.indices] = True

    def batch(self, reader: Reader, rows: Rows) -> Batch:
        """Make a batch of decoded samples: offsets into the pixels, or a gathered copy."""
        indices = self.sources[rows.indices]
        skipped = rows.indices[indices != rows.indices]
        whole, sources = self.packing, Rows(indices, rows.epochs)
        if self.place == self.device:
            part = Packing(sources, whole.sizes[indices], whole.begins[indices], whole.ends[indices])
            return part.batch(reader, self.pixels, skipped=skipped)
        part = pack(reader, sources)
        buffer = part.empty(self.device)
        gather = _gather_equal if self.has_one_size else _gather
        gather(self.pixels, whole, part, buffer)
        return part.batch(reader, buffer, skipped=skipped)


def gpu_advice(reader: Reader, *, free: int) -> str:
    """Return what to give so that a file's images fit on a GPU of so many free bytes, "" where nothing helps."""
    side = side_that_fits(reader, lambda each: _pack_all(each).buffer_bytes() <= GPU_SHARE * free)
    return "" if side is None else f"; with --memory-side {side} it would fit"


def _pack_all(reader: Reader) -> Packing:
    """Lay out every sample, in the order of the file."""
    everything = np.arange(len(reader), dtype=np.int64)
    return pack(reader, Rows(everything, np.zeros_like(everything)))


def _gather_equal(pixels: Tensor, whole: Packing, part: Packing, out: Tensor) -> None:
    """Copy images of equal size, by torch's threads."""
    length, count = int(whole.ends[0]), len(part.begins)
    images = pixels[: whole.image_bytes()].view(-1, length)
    torch.index_select(images, 0, torch.from_numpy(part.rows.indices), out=out[: count * length].view(count, length))


def _gather(pixels: Tensor, whole: Packing, part: Packing, out: Tensor) -> None:
    """Copy images of any sizes, one by one."""
    source, target = pixels.numpy(), out.numpy()
    for index, begin, end in part.places():
        first = int(whole.begins[index])
        target[begin:end] = source[first : first + end - begin]


# The decoded samples of each file: calibration, training and recalibration load one after the other.
DECODED_FILES: WeakKeyDictionary[Reader, dict[torch.device, _DecodedFile]] = WeakKeyDictionary()
