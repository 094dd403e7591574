"""Know how to have the ffcv package decode: its reader, pipeline and threads, with a decoder that runs once an image.

ffcv 1.0.2 by itself decodes once for each view, ignores the decoder's return codes and leaves the caller waiting
forever when its thread dies. Here the decoder reports the code of every image, and the thread's death is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from queue import Empty
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TORCH_THREADS = torch.get_num_threads()  # importing ffcv sets 1

import numba  # noqa: E402
from ffcv.fields.rgb_image import RGBImageField, SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, memcpy  # noqa: E402
from ffcv.loader import Loader, OrderOption  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.reader import Reader as FieldReader  # noqa: E402

from fastbyol.beton import JPEG, BetonError, Reader  # noqa: E402
from fastbyol.loaders import PREFETCH, Batch  # noqa: E402
from fastbyol.loaders.aside import prefetch_in_thread  # noqa: E402
from fastbyol.loaders.faults import StandIns  # noqa: E402
from fastbyol.loaders.packing import pack  # noqa: E402
from fastbyol.loaders.stored import unreadable_jpeg  # noqa: E402
from fastbyol.order import Rows  # noqa: E402

torch.set_num_threads(TORCH_THREADS)

CHUNK_BYTES = 2**26  # ffcv's buffers hold the largest image of the file in every place
CHUNK_IMAGES = 256
CHUNKS = 4  # one being filled, one being emptied, the others in between
BATCHES_AT_ONCE = 256  # given to one ffcv iterator; where it ends, its pipeline runs dry once
POLL_S, END_POLL_S = 0.2, 0.01
OTHER_SIZE = -2  # code beside those of libjpeg-turbo (0, -1)


def load(
    reader: Reader,
    batches: Iterable[Rows],
    *,
    workers: int,
    prefetch: int = PREFETCH,
    on_error: str = "fail",
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Yield the decoded batches in the order given, by `workers` threads of ffcv's, up to `prefetch` in advance.

    Pixels are those of libjpeg-turbo's fast DCT, which ffcv asks for: a few levels from the other loaders'. Beside the
    batches, memory holds CHUNKS of ffcv's buffers, CHUNK_BYTES each or one image a worker where that is more.
    """
    stand_ins = StandIns(reader, on_error=on_error)
    return prefetch_in_thread(_assembled(reader, batches, stand_ins, workers, device), prefetch=prefetch, device=device)


def decoding_threads(reader: Reader, *, workers: int) -> int | None:  # noqa: ARG001
    """Return how many threads decode when `workers` are asked for; None where more would not help: numba's all."""
    return workers if workers < numba.config.NUMBA_NUM_THREADS else None


def _assembled(
    reader: Reader, batches: Iterable[Rows], stand_ins: StandIns, workers: int, device: torch.device | str
) -> Generator[Batch, None, None]:
    """Copy ffcv's images, which come in chunks whatever the batches are, together to batches."""
    source = iter(batches)
    loader = _loader(reader, workers=workers)
    several: list[Rows] = []
    while several := several or list(islice(source, BATCHES_AT_ONCE)):
        known, done = len(stand_ins), 0
        asked = [stand_ins.substitute(rows) for rows in several]
        order = np.concatenate([rows.indices for rows, _ in asked]).astype(np.uint64)
        with closing(_images(loader, order)) as images:
            for rows, skipped in asked:
                yield _batch(reader, rows, images, stand_ins, skipped=skipped, device=device)
                done += 1
                if len(stand_ins) > known:  # a bad sample was found, and may come again in the order ffcv was given
                    break
        several = several[done:]


def _batch(
    reader: Reader,
    rows: Rows,
    images: Iterator[tuple[NDArray[np.uint8], int]],
    stand_ins: StandIns,
    *,
    skipped: NDArray[np.int64],
    device: torch.device | str,
) -> Batch:
    """Copy the next of ffcv's images together; raise RuntimeError when they end too early."""
    packing = pack(reader, rows)
    pixels = packing.empty(device)
    target, faults = pixels.numpy(), []
    for index, begin, end in packing.places():
        image, code = next(images, (None, 0))
        if image is None:
            raise RuntimeError(f"{reader.path}: ffcv ended its iteration before sample {index} of its order")
        if code == 0:
            target[begin:end] = image[: end - begin]
        else:
            faults.append((index, _error(reader, index, code)))
    return stand_ins.make_batch(packing, pixels, faults, empty=lambda packing: packing.empty(device), skipped=skipped)


def _error(reader: Reader, index: int, code: int) -> BetonError:
    reason = "its size is not that of its record" if code == OTHER_SIZE else "refused by libjpeg-turbo"
    return unreadable_jpeg(reader, index, reason)


def _loader(reader: Reader, *, workers: int) -> Any:
    """Build ffcv's loader of whole images, without their labels."""
    threads = min(workers, numba.config.NUMBA_NUM_THREADS)
    largest = int((reader.heights * reader.widths).max()) * 3
    chunk = int(np.clip(CHUNK_BYTES // largest, threads, CHUNK_IMAGES))
    handlers = FieldReader(str(reader.path)).handlers
    fields = [name for name, handler in handlers.items() if isinstance(handler, RGBImageField)]
    field = "image" if "image" in fields else fields[0]
    pipelines = {name: [WholeImages()] if name == field else None for name in handlers}
    order = OrderOption.SEQUENTIAL  # every iterator is given its own
    array_type = numba.uint8[::1]  # shared by all of numba; ffcv makes it read-only, which breaks numba's tables
    Compiler.set_enabled(False)  # the decoder comes compiled
    try:
        loader = Loader(
            str(reader.path),
            batch_size=chunk,
            num_workers=threads,
            os_cache=True,
            order=order,
            pipelines=pipelines,
            batches_ahead=CHUNKS - 2,
        )
    finally:
        Compiler.set_enabled(True)
        array_type.mutable = True
        torch.set_num_threads(TORCH_THREADS)
    return loader


def _images(loader: Any, order: NDArray[np.uint64]) -> Generator[tuple[NDArray[np.uint8], int], None, None]:
    """Yield the pixels and the decoder's code of each sample in order; the pixels are valid until the next."""
    epoch = Epoch(loader, order)
    try:
        for ((pixels, codes),) in epoch.results():
            yield from zip(pixels, codes[:, 0].tolist(), strict=True)
    finally:
        epoch.end()


class Epoch(EpochIterator):  # type: ignore[misc]
    """Be ffcv's iterator, a thread, whose death is noticed."""

    failure: BaseException | None = None

    def run(self) -> None:
        """Do the work of the thread, and remember what ended it."""
        try:
            super().run()
        except BaseException as error:
            self.failure = error
            raise

    def results(self) -> Iterator[Any]:
        """Yield what the thread makes; raise RuntimeError when it died, where ffcv would wait forever."""
        while True:
            try:
                result = self.output_queue.get(timeout=POLL_S)
            except Empty:
                if not self.is_alive() and self.output_queue.empty():
                    raise RuntimeError(f"ffcv's thread died: {self.failure!r}") from self.failure
                continue
            if result is None:
                return
            _, images = result
            yield images

    def run_pipeline(self, *settings: Any) -> Any:
        """Decode the next chunk, unless the end has been asked for: ffcv looks only when its queue is full."""
        if self.terminate_event.is_set():
            raise StopIteration
        return super().run_pipeline(*settings)

    def end(self) -> None:
        """End the thread, which may be waiting for room in the queue, and let the file go."""
        self.terminate_event.set()
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get_nowait()
            self.join(END_POLL_S)
        self.close()


class WholeImages(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Decode whole images of any sizes, each to the start of its own row; report the decoder's code of each.

    The result is pixels uint8 [chunk, bytes of the largest image], codes int32 [chunk, 1]: 0 where the pixels are good.
    """

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, tuple[AllocationQuery, AllocationQuery]]:
        """Ask ffcv for the two buffers."""
        largest = int((self.metadata["width"].astype(np.int64) * self.metadata["height"]).max()) * 3
        pixels, codes = np.dtype("u1"), np.dtype("i4")
        state = replace(previous_state, jit_mode=True, shape=(largest,), dtype=pixels)
        return state, (AllocationQuery((largest,), pixels), AllocationQuery((1,), codes))

    def generate_code(self) -> Callable[..., Any]:
        """Return the compiled decoder, which runs without the GIL."""
        return _compiled(is_parallel=Compiler.get_iterator() is numba.prange)


@cache
def _compiled(*, is_parallel: bool) -> Callable[..., Any]:
    """Compile the decoder with numba, once a process: ffcv would do it for every loader anew, and never free it."""
    decode_jpeg, copy, has_size = (numba.njit(nogil=True)(function) for function in (imdecode, memcpy, _has_size))
    images = numba.prange if is_parallel else range

    @numba.njit(nogil=True, parallel=is_parallel)
    def decode(batch_indices, storage, metadata, storage_state):  # type: ignore[no-untyped-def]
        pixels, codes = storage
        file, ptrs, sizes = storage_state
        for place in images(len(batch_indices)):
            record = metadata[batch_indices[place]]
            height, width, ptr = record["height"], record["width"], record["data_ptr"]
            data = file[ptr : ptr + sizes[np.searchsorted(ptrs, ptr)]]
            if record["mode"] != JPEG:
                copy(data, pixels[place])
                codes[place, 0] = 0
            elif has_size(data, height, width):
                codes[place, 0] = decode_jpeg(
                    data, pixels[place], height, width, height, width, 0, 0, 1, 1, False, False
                )
            else:
                codes[place, 0] = OTHER_SIZE
        return pixels, codes

    compiled: Callable[..., Any] = decode
    return compiled


def _has_size(data, height, width):  # type: ignore[no-untyped-def]
    """Tell whether a JPEG's frame header (SOF) gives this size; libjpeg-turbo would scale a larger image down."""
    at = 2
    while at + 9 <= data.size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the other three are tables
            return data[at + 5] * 256 + data[at + 6] == height and data[at + 7] * 256 + data[at + 8] == width
        at += 2 + data[at + 2] * 256 + data[at + 3]
    return False
