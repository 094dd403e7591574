"""Loader native: threads that decode a .beton's JPEGs to packed pixels ahead of training, once an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import BetonError, Reader
from fastbyol.loaders.batch import PREFETCH, Batch, Packing, max_batch_bytes, pack
from fastbyol.loaders.decode import decode_into
from fastbyol.loaders.resized import stored_in_file
from fastbyol.loaders.stand_ins import BadSamples, StandIns
from fastbyol.order import Rows

PARTS_PER_WORKER = 2  # of a batch: a thread that finishes early takes work from a late one
SMALL_PIXELS = 64 * 64  # of the mean image; below it, handing the GIL around costs threads more than they gain


class _PendingBatch(NamedTuple):
    """A batch that threads are decoding."""

    packing: Packing
    skipped: NDArray[np.int64]
    pixels: Tensor
    parts: list[Future[BadSamples]]


def load(
    reader: Reader,
    batches: Iterable[Rows],
    *,
    workers: int,
    prefetch: int = PREFETCH,
    on_error: str = "fail",
    device: torch.device | str = "cpu",
    processes: int = 1,  # noqa: ARG001  # one signature for all loaders
) -> Generator[Batch, None, None]:
    """Yield the decoded batches in the given order, while `workers` threads decode up to `prefetch` in advance.

    Beside the batches that the caller still holds, memory holds at most the last one yielded and `prefetch` more,
    max_load_bytes(), for any number of threads and also while bad samples are replaced; of a ResizedReader also one
    image a thread in its stored size. An error is raised when its batch is due.
    """
    source = iter(batches)
    count = decoding_threads(reader, workers=workers) or 1
    stand_ins = StandIns(reader, on_error=on_error)

    def empty(packing: Packing) -> Tensor:
        return packing.empty(device)

    pool, waits = ThreadPoolExecutor(count, thread_name_prefix="decode"), True
    pending: deque[_PendingBatch] = deque()

    def submit(batches: int) -> None:
        for rows in islice(source, batches):
            pending.append(
                _submit(pool, reader, stand_ins.substitute(rows), parts=PARTS_PER_WORKER * count, device=device)
            )

    try:
        submit(prefetch)
        while pending:
            packing, skipped, pixels, parts = pending.popleft()
            bad = [sample for part in parts for sample in part.result()]
            batch = stand_ins.make_batch(packing, pixels, bad, empty=empty, skipped=skipped)
            del pixels  # the first buffer, where the batch has a new one with stand-ins
            submit(1)
            yield batch
            del batch  # so that only the caller holds it while the next is made
    except KeyboardInterrupt:
        waits = False  # a thread may hang on its disk
        raise
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)


def decoding_threads(reader: Reader, *, workers: int) -> int | None:
    """Return the number of decoding threads; None where it is one for any `workers`, since the images are small."""
    stored = stored_in_file(reader)
    return None if np.mean(stored.heights * stored.widths) < SMALL_PIXELS else workers


def max_load_bytes(reader: Reader, *, batch_size: int, prefetch: int) -> int:
    """Return the most bytes that the decoded batches of load() take, the last one yielded included.

    Pinned memory takes more: torch's allocator rounds each buffer up to a power of two and keeps freed buffers.
    """
    return (prefetch + 1) * max_batch_bytes(reader, batch_size=batch_size)


def _submit(
    pool: ThreadPoolExecutor,
    reader: Reader,
    substituted: tuple[Rows, NDArray[np.int64]],
    *,
    parts: int,
    device: torch.device | str,
) -> _PendingBatch:
    """Start decoding a batch, in parts of about equally many images."""
    rows, skipped = substituted
    packing = pack(reader, rows)
    pixels = packing.empty(device)
    cuts = np.linspace(0, len(rows.indices), min(parts, len(rows.indices)) + 1).astype(int).tolist()
    places = [range(first, end) for first, end in pairwise(cuts)]
    futures = [pool.submit(_decode_and_release, reader, packing, [pixels.numpy()], part) for part in places]
    return _PendingBatch(packing, skipped, pixels, futures)


def _decode_and_release(reader: Reader, packing: Packing, buffer: list[NDArray[np.uint8]], places: range) -> BadSamples:
    """Decode a part of a batch into the buffer that the list holds, and empty the list.

    A pool's thread drops the arguments of a task only some time after the task's result has arrived, which would keep
    the buffer of a batch that was already replaced.
    """
    return decode_part(reader, packing, buffer.pop(), places)


def decode_part(reader: Reader, packing: Packing, pixels: NDArray[np.uint8], places: range) -> BadSamples:
    """Decode the images at these places of a batch into its buffer; return the bad samples."""
    bad: BadSamples = []
    for index, begin, end in packing.places(places.start, places.stop):
        try:
            decode_into(pixels[begin:end], reader, index)
        except BetonError as error:
            bad.append((index, BetonError(str(error))))  # a copy without frames, which would keep the pixels alive
    return bad


def decode(reader: Reader, rows: Rows) -> Batch:
    """Decode one batch in this thread; raise BetonError naming a sample that does not decode."""
    packing = pack(reader, rows)
    pixels = packing.empty()
    for _, error in decode_part(reader, packing, pixels.numpy(), range(len(rows.indices))):
        raise error
    return packing.batch(reader, pixels, skipped=rows.indices[:0])
