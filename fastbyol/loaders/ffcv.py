"""Loader ffcv: the ffcv package's reader, pipeline and threads, with a decoder that runs once an image.

ffcv 1.0.2 by itself decodes once for each view, ignores the decoder's return codes and lets the caller wait forever
when its thread dies. Here the decoder reports the code of every image, and the death of the thread raises.
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
from fastbyol.errors import ConfigError  # noqa: E402
from fastbyol.loaders.batch import (  # noqa: E402
    PREFETCH,
    Batch,
    pack,
)
from fastbyol.loaders.decode import unreadable_jpeg  # noqa: E402
from fastbyol.loaders.prefetch import prefetch_in_thread  # noqa: E402
from fastbyol.loaders.stand_ins import BadSamples, StandIns  # noqa: E402
from fastbyol.order import Rows  # noqa: E402

torch.set_num_threads(TORCH_THREADS)

CHUNK_BYTES = 2**26  # of ffcv's buffers, in which every place has room for the largest image of the file
CHUNK_IMAGES = 256
CHUNKS = 4  # one that ffcv fills, one that is read, the others in between
BATCHES_AT_ONCE = 256  # for one ffcv iterator; at its end the pipeline runs empty once
POLL_S, END_POLL_S = 0.2, 0.01
OTHER_SIZE = -2  # a code in addition to those of libjpeg-turbo (0, -1)


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
    """Yield the decoded batches in the given order, by `workers` threads of ffcv's, up to `prefetch` in advance.

    Pixels are those of libjpeg-turbo's fast DCT, which ffcv uses: they differ from the other loaders' by a few levels.
    Beside the batches, memory holds CHUNKS of ffcv's buffers, each of CHUNK_BYTES or, where that is more, of one image
    a worker. Raises ConfigError for a part of a file, whose samples ffcv would number otherwise.
    """
    if reader.is_part:
        raise ConfigError(f"loader ffcv reads whole files, and here a part of {reader.path} is read; give native")
    stand_ins = StandIns(reader, on_error=on_error)
    return prefetch_in_thread(_assemble(reader, batches, stand_ins, workers, device), prefetch=prefetch, device=device)


def decoding_threads(reader: Reader, *, workers: int) -> int | None:  # noqa: ARG001
    """Return the number of decoding threads; None where more would not help, since numba has no more."""
    return workers if workers < numba.config.NUMBA_NUM_THREADS else None


def _assemble(
    reader: Reader, batches: Iterable[Rows], stand_ins: StandIns, workers: int, device: torch.device | str
) -> Generator[Batch, None, None]:
    """Assemble batches from ffcv's images, which come in chunks of a fixed size."""
    source = iter(batches)
    loader = _loader(reader, workers=workers)
    several: list[Rows] = []
    while several := several or list(islice(source, BATCHES_AT_ONCE)):
        known, done = len(stand_ins), 0
        substituted = [stand_ins.substitute(rows) for rows in several]
        order = np.concatenate([rows.indices for rows, _ in substituted]).astype(np.uint64)
        with closing(_images(loader, order)) as images:
            for rows, skipped in substituted:
                yield _batch(reader, rows, images, stand_ins, skipped=skipped, device=device)
                done += 1
                if len(stand_ins) > known:  # a new bad sample, which may come again in the order that ffcv has
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
    """Make a batch of ffcv's next images; raise RuntimeError where they end too early."""
    packing = pack(reader, rows)
    pixels = packing.empty(device)
    target, bad = pixels.numpy(), BadSamples()
    for index, begin, end in packing.places():
        image, code = next(images, (None, 0))
        if image is None:
            raise RuntimeError(f"{reader.path}: ffcv ended its iteration before sample {index} of its order")
        if code == 0:
            target[begin:end] = image[: end - begin]
        else:
            bad.append((index, _error(reader, index, code)))
    return stand_ins.make_batch(packing, pixels, bad, empty=lambda packing: packing.empty(device), skipped=skipped)


def _error(reader: Reader, index: int, code: int) -> BetonError:
    reason = "its size differs from its record's" if code == OTHER_SIZE else "refused by libjpeg-turbo"
    return unreadable_jpeg(reader, index, reason)


def _loader(reader: Reader, *, workers: int) -> Any:
    """Build ffcv's loader of whole images, without labels."""
    threads = min(workers, numba.config.NUMBA_NUM_THREADS)
    largest = int((reader.heights * reader.widths).max()) * 3
    chunk = int(np.clip(CHUNK_BYTES // largest, threads, CHUNK_IMAGES))
    handlers = FieldReader(str(reader.path)).handlers
    fields = [name for name, handler in handlers.items() if isinstance(handler, RGBImageField)]
    field = "image" if "image" in fields else fields[0]
    pipelines = {name: [WholeImages()] if name == field else None for name in handlers}
    order = OrderOption.SEQUENTIAL  # each iterator sets its own
    array_type = numba.uint8[::1]  # global to numba; ffcv makes it read-only, which breaks numba's tables
    Compiler.set_enabled(False)  # the decoder is compiled already
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
    """Yield the pixels and the decoder's code of each sample in order; pixels are valid until the next yield."""
    epoch = Epoch(loader, order)
    try:
        for ((pixels, codes),) in epoch.results():
            yield from zip(pixels, codes[:, 0].tolist(), strict=True)
    finally:
        epoch.end()


class Epoch(EpochIterator):  # type: ignore[misc]
    """ffcv's iterator, a thread, with an exception where the thread dies."""

    failure: BaseException | None = None

    def run(self) -> None:
        """Run the thread, and store the exception that ends it."""
        try:
            super().run()
        except BaseException as error:
            self.failure = error
            raise

    def results(self) -> Iterator[Any]:
        """Yield the thread's results; raise RuntimeError when the thread has died, where ffcv would wait forever."""
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
        """Decode the next chunk, unless the thread must end: ffcv checks for that only when its queue is full."""
        if self.terminate_event.is_set():
            raise StopIteration
        return super().run_pipeline(*settings)

    def end(self) -> None:
        """End the thread, which may wait for room in the queue, and close the file."""
        self.terminate_event.set()
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get_nowait()
            self.join(END_POLL_S)
        self.close()


class WholeImages(SimpleRGBImageDecoder):  # type: ignore[misc]
    """A decoder of whole images of any sizes, each to the start of its own row, with a code for each.

    Its results: pixels uint8 [chunk, bytes of the largest image]; codes int32 [chunk, 1], 0 where the pixels are good.
    """

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, tuple[AllocationQuery, AllocationQuery]]:
        """Request the two buffers from ffcv."""
        largest = int((self.metadata["width"].astype(np.int64) * self.metadata["height"]).max()) * 3
        pixels, codes = np.dtype("u1"), np.dtype("i4")
        state = replace(previous_state, jit_mode=True, shape=(largest,), dtype=pixels)
        return state, (AllocationQuery((largest,), pixels), AllocationQuery((1,), codes))

    def generate_code(self) -> Callable[..., Any]:
        """Return the compiled decoder, which releases the GIL."""
        return _compile_decoder(is_parallel=Compiler.get_iterator() is numba.prange)


@cache
def _compile_decoder(*, is_parallel: bool) -> Callable[..., Any]:
    """Compile the decoder with numba, once a process: ffcv would compile it for every loader and never free it."""
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
    """Tell whether a JPEG's frame header (SOF) has this size; libjpeg-turbo would scale a larger image down."""
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
