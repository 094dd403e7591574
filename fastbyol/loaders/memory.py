"""Know how to decode each image of a file once, keep it as uint8 in RAM or on the GPU, and serve batches from there."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.config import ConfigError
from fastbyol.loaders import PREFETCH, Batch, native
from fastbyol.loaders.packing import Packing, max_batch_bytes, pack
from fastbyol.loaders.ram import available_bytes
from fastbyol.order import Rows

RAM_SHARE = 0.9  # of what is available
GPU_SHARE = 0.5  # of what is free before training, which still wants its own
GATHERED = 2  # batches for a GPU that the file does not fit on: the one handed out, and the next
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
    """Yield the batches in the order given; a sample is decoded, as by native, when it is first asked for, and kept.

    The pixels rest on `device` if they fit there, and a batch is then the whole of them with the offsets of its images:
    nothing is copied. Otherwise they rest in RAM, and a batch for a GPU is gathered into a pinned buffer. They rest as
    long as the reader lives: what is loaded later with the same reader finds them there. Raises ConfigError, here and
    before anything is decoded, when all samples fit nowhere; `processes` of this machine take as much RAM each.
    """
    source = iter(batches)
    first = next(source, None)
    rows = source if first is None else chain([first], source)
    place, kept = torch.device(device), DECODED_FILES.get(reader, {})
    if place not in kept:
        resident = _DecodedFile(reader, place)
        batch_size = 1 if first is None else len(first.indices)
        resident.find_room(reader, batch_size=batch_size, prefetch=prefetch, processes=processes)
        kept = DECODED_FILES.setdefault(reader, kept)
        kept[place] = resident
    return _served(kept[place], reader, iter(rows), workers=workers, prefetch=prefetch, on_error=on_error)


def decoding_threads(reader: Reader, *, workers: int) -> int | None:  # noqa: ARG001
    """Return None: once every sample is there, no number of threads brings the next batch sooner."""
    return None


def _served(
    resident: _DecodedFile, reader: Reader, batches: Iterator[Rows], *, workers: int, prefetch: int, on_error: str
) -> Generator[Batch, None, None]:
    """Decode what each batch is the first to ask for, until all samples are there; then only serve."""
    waiting: deque[tuple[Rows, Rows]] = deque()
    was_asked = resident.serves(on_error)  # here: what another generator asked for, it may never have taken

    def missing() -> Iterator[Rows]:
        while not was_asked.all() and (rows := next(batches, None)) is not None:
            asked = np.unique(rows.indices[~was_asked[rows.indices]])  # in the order of the file
            was_asked[asked] = True
            waiting.append((rows, Rows(asked, np.zeros_like(asked))))
            yield waiting[-1][1]

    native_batches = native.load(
        reader, missing(), workers=workers, prefetch=prefetch, on_error=on_error, device=resident.place
    )
    with closing(native_batches) as decoded:
        for batch in decoded:
            rows, asked = waiting.popleft()
            resident.keep(asked, batch)
            del batch
            yield resident.batch(reader, rows)
    for rows in batches:
        yield resident.batch(reader, rows)


class _DecodedFile:
    """Hold the decoded file, as far as it has been asked for, for batches to `device`; not its reader, which owns it.

    packing: where each sample of the file lies; sources: int64 [N], the sample that stands for each, itself or, where
    it does not decode, another; is_there: bool [N].
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.device, self.place = device, device
        everything = np.arange(len(reader), dtype=np.int64)
        self.packing = pack(reader, Rows(everything, np.zeros_like(everything)))
        self.sources = everything.copy()
        self.is_there = np.zeros(len(reader), bool)
        self.has_one_size = bool((self.packing.sizes == self.packing.sizes[0]).all())

    def find_room(self, reader: Reader, *, batch_size: int, prefetch: int, processes: int) -> None:
        """Choose where the pixels rest: the device, else the host; raise ConfigError when they fit on neither."""
        size = self.packing.buffer_bytes()
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if size <= GPU_SHARE * free:
                self.pixels = torch.empty(size, dtype=torch.uint8, device=self.device)
                return
            log.warning(
                "decoded, %s takes %.1f GiB, more than %.0f %% of the %.1f GiB free on %s: kept in RAM and copied",
                *(reader.path, size / GIB, 100 * GPU_SHARE, free / GIB, self.device),
            )
            self.place = torch.device("cpu")
        beside = min(native.max_load_bytes(reader, batch_size=batch_size, prefetch=prefetch), size)  # each image once
        if self.place != self.device:
            beside += GATHERED * max_batch_bytes(reader, batch_size=batch_size)
        available = available_bytes()
        if processes * (size + beside) > RAM_SHARE * available:
            each = "" if processes == 1 else f" in each of {processes} processes"
            raise ConfigError(
                f"decoded, {reader.path} takes {size / GIB:.1f} GiB, and decoding it up to {beside / GIB:.1f} GiB"
                f"{each}; {available / GIB:.1f} GiB of RAM are available, of which loader memory takes up to "
                f"{RAM_SHARE:.0%}; give --loader native, or write smaller images"
            )
        self.pixels = self.packing.empty()

    def serves(self, on_error: str) -> NDArray[np.bool_]:
        """Tell which samples need not be decoded, bool [N]; under "fail" no stand-in is served for a bad one."""
        if on_error == "fail":
            stands_for_itself: NDArray[np.bool_] = self.sources == np.arange(len(self.sources))
            return np.logical_and(self.is_there, stands_for_itself)
        return self.is_there.copy()

    def keep(self, asked: Rows, batch: Batch) -> None:
        """Copy decoded images, stand-ins for bad ones among them, to the places where the file has them."""
        self.sources[asked.indices] = batch.indices
        packing, pixels = self.packing, self.pixels
        for index, first in zip(batch.indices.tolist(), batch.offsets.tolist(), strict=True):
            begin, end = int(packing.begins[index]), int(packing.ends[index])
            image = batch.pixels[first : first + end - begin]
            if pixels.is_cuda:
                pixels[begin:end].copy_(image, non_blocking=True)
            else:  # torch would split each image between its threads
                np.copyto(pixels[begin:end].numpy(), image.numpy())
        self.is_there[asked.indices] = True

    def batch(self, reader: Reader, rows: Rows) -> Batch:
        """Serve a batch whose samples are all there: pointing into the pixels, or gathered from them."""
        indices = self.sources[rows.indices]
        skipped = rows.indices[indices != rows.indices]
        whole, now = self.packing, Rows(indices, rows.epochs)
        if self.place == self.device:
            part = Packing(now, whole.sizes[indices], whole.begins[indices], whole.ends[indices])
            return part.batch(reader, self.pixels, skipped=skipped)
        part = pack(reader, now)
        buffer = part.empty(self.device)
        gather = _gather_equal if self.has_one_size else _gather
        gather(self.pixels, whole, part, buffer)
        return part.batch(reader, buffer, skipped=skipped)


def _gather_equal(pixels: Tensor, whole: Packing, part: Packing, out: Tensor) -> None:
    """Copy images of one size, by torch's threads."""
    length, count = int(whole.ends[0]), len(part.begins)
    images = pixels[: whole.image_bytes()].view(-1, length)
    torch.index_select(images, 0, torch.from_numpy(part.rows.indices), out=out[: count * length].view(count, length))


def _gather(pixels: Tensor, whole: Packing, part: Packing, out: Tensor) -> None:
    """Copy images of any sizes, one by one."""
    source, target = pixels.numpy(), out.numpy()
    for index, begin, end in part.places():
        first = int(whole.begins[index])
        target[begin:end] = source[first : first + end - begin]


# What rests of each file: calibration, training and recalibration load one after the other.
DECODED_FILES: WeakKeyDictionary[Reader, dict[torch.device, _DecodedFile]] = WeakKeyDictionary()
