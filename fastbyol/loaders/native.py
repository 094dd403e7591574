"""Know how to decode batches ahead of training, with threads: a beton's JPEG bytes to packed pixels, once an image."""

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
from fastbyol.loaders import PREFETCH, Batch
from fastbyol.loaders.faults import BadSamples, StandIns
from fastbyol.loaders.packing import Packing, max_batch_bytes, pack
from fastbyol.loaders.stored import decode_into
from fastbyol.order import Rows

PARTS_PER_WORKER = 2  # of a batch: a thread that finishes early takes over from a late one
SMALL_PIXELS = 64 * 64  # mean image; below it threads lose more by passing the GIL around than decoding gains


class _Decoding(NamedTuple):
    """Hold a batch under way."""

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
) -> Generator[Batch, None, None]:
    """Yield the decoded batches in the order given, while `workers` threads decode up to `prefetch` in advance.

    Beside the batches the caller still holds, memory holds at most the one handed out and `prefetch` more, whatever the
    number of threads and also while one of them is repaired: max_load_bytes(). An error is raised at its batch's turn.
    """
    source = iter(batches)
    count = decoding_threads(reader, workers=workers) or 1
    stand_ins = StandIns(reader, on_error=on_error)

    def empty(packing: Packing) -> Tensor:
        return packing.empty(device)

    pool, waits = ThreadPoolExecutor(count, thread_name_prefix="decode"), True
    pending: deque[_Decoding] = deque()

    def begin(batches: int) -> None:
        for rows in islice(source, batches):
            pending.append(_submit(pool, reader, stand_ins.substitute(rows), parts=PARTS_PER_WORKER * count, to=device))

    try:
        begin(prefetch)
        while pending:
            packing, skipped, pixels, parts = pending.popleft()
            faults = [fault for part in parts for fault in part.result()]
            batch = stand_ins.make_batch(packing, pixels, faults, empty=empty, skipped=skipped)
            del pixels  # of a batch that was repaired, the damaged copy
            begin(1)
            yield batch
            del batch  # while the next is made, its memory is the caller's to free
    except KeyboardInterrupt:
        waits = False  # a thread may hang with its disk
        raise
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)


def decoding_threads(reader: Reader, *, workers: int) -> int | None:
    """Return how many threads decode when `workers` are asked for; None where it is one whatever is asked for."""
    return None if np.mean(reader.heights * reader.widths) < SMALL_PIXELS else workers


def max_load_bytes(reader: Reader, *, batch_size: int, prefetch: int) -> int:
    """Return the most that the decoded batches of load() take, the one handed out among them.

    Pinned memory comes on top of it: torch's allocator rounds each buffer up to a power of two and keeps what it had.
    """
    return (prefetch + 1) * max_batch_bytes(reader, batch_size=batch_size)


def _submit(
    pool: ThreadPoolExecutor,
    reader: Reader,
    asked: tuple[Rows, NDArray[np.int64]],
    *,
    parts: int,
    to: torch.device | str,
) -> _Decoding:
    """Begin to decode a batch, in parts of about equally many images."""
    rows, skipped = asked
    packing = pack(reader, rows)
    pixels = packing.empty(to)
    cuts = np.linspace(0, len(rows.indices), min(parts, len(rows.indices)) + 1).astype(int).tolist()
    places = [range(first, end) for first, end in pairwise(cuts)]
    return _Decoding(
        packing, skipped, pixels, [pool.submit(decode_part, reader, packing, pixels.numpy(), part) for part in places]
    )


def decode_part(reader: Reader, packing: Packing, pixels: NDArray[np.uint8], places: range) -> BadSamples:
    """Decode the images at these places of the batch into its buffer; return those that do not decode."""
    faults: BadSamples = []
    for index, begin, end in packing.places(places.start, places.stop):
        try:
            decode_into(pixels[begin:end], reader, index)
        except BetonError as error:
            faults.append((index, BetonError(str(error))))  # one without frames, which would keep the pixels alive
    return faults


def decode(reader: Reader, rows: Rows) -> Batch:
    """Decode one batch here and now; raise BetonError naming a sample that does not decode."""
    packing = pack(reader, rows)
    pixels = packing.empty()
    for _, error in decode_part(reader, packing, pixels.numpy(), range(len(rows.indices))):
        raise error
    return packing.batch(reader, pixels, skipped=rows.indices[:0])
