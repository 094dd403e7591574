"""Know how to have NVIDIA DALI decode: JPEG bytes of our order in, whole images out, on the GPU where there is one.

DALI draws nothing and crops nothing: views come from the same kernels and the same draws as under every other loader.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastbyol.beton import JPEG, BetonError, Reader
from fastbyol.loaders import PREFETCH, Batch
from fastbyol.loaders.aside import prefetch_in_thread
from fastbyol.loaders.faults import BadSamples, StandIns
from fastbyol.loaders.packing import Packing, pack
from fastbyol.loaders.stored import decode_to_tensor, size_mismatch
from fastbyol.order import Rows

CHUNK_IMAGES = 64  # a run of the pipeline
CHUNKS = 3  # under way in the pipeline

log = logging.getLogger(__name__)


def load(
    reader: Reader,
    batches: Iterable[Rows],
    *,
    workers: int,
    prefetch: int = PREFETCH,
    on_error: str = "fail",
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Yield the decoded batches in the order given, by DALI with `workers` threads, up to `prefetch` in advance.

    On the CPU the pixels are native's. On a GPU DALI's mixed decoder leaves them there. Beside the batches, memory
    holds the images of CHUNKS runs. DALI takes some JPEGs with a few wrong bits as they come, where the other loaders
    raise; what it refuses is tried by libjpeg.
    """
    stand_ins = StandIns(reader, on_error=on_error)
    return prefetch_in_thread(
        _assembled(reader, batches, stand_ins, workers, torch.device(device)), prefetch=prefetch, device=device
    )


def decoding_threads(reader: Reader, *, workers: int) -> int | None:  # noqa: ARG001
    """Return how many threads decode when `workers` are asked for; None where more would not help."""
    return workers


class _Chunk(NamedTuple):
    """Hold one run: places of a batch whose images are JPEGs, none for a batch of raw images only."""

    packing: Packing
    skipped: NDArray[np.int64]
    places: NDArray[np.int64]
    is_last: bool


def _chunks(reader: Reader, batches: Iterable[Rows], stand_ins: StandIns) -> Iterator[_Chunk]:
    """Split batches into runs of the pipeline; none spans two batches."""
    for asked in batches:
        rows, skipped = stand_ins.substitute(asked)
        packing = pack(reader, rows)
        places = np.flatnonzero(reader.modes[rows.indices] == JPEG)
        parts = np.array_split(places, max(-(-len(places) // CHUNK_IMAGES), 1))
        for number, part in enumerate(parts, 1):
            yield _Chunk(packing, skipped, part, is_last=number == len(parts))


def _assembled(
    reader: Reader, batches: Iterable[Rows], stand_ins: StandIns, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Copy the pipeline's images together to batches, with the raw ones, which no decoder sees."""

    def empty(packing: Packing) -> Tensor:
        return torch.zeros(packing.buffer_bytes(), dtype=torch.uint8, device=device)

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    decoder = _Decoder(reader, workers=workers, device=device)
    chunks = _chunks(reader, batches, stand_ins)
    coming = deque(islice(chunks, CHUNKS))
    for chunk in coming:
        decoder.begin(chunk)
    pixels, faults = None, BadSamples()
    with torch.cuda.stream(stream):  # copies wait for no step of the training; nothing without a GPU
        while coming:
            chunk = coming.popleft()
            if pixels is None:
                pixels = empty(chunk.packing)
            faults += decoder.end(chunk, pixels, coming)
            for chunk_after in islice(chunks, 1):
                coming.append(chunk_after)
                decoder.begin(chunk_after)
            if chunk.is_last:
                _put_raw(reader, chunk.packing, pixels)
                batch = stand_ins.make_batch(chunk.packing, pixels, faults, empty=empty, skipped=chunk.skipped)
                if stream is not None:
                    stream.synchronize()
                pixels, faults = None, BadSamples()
                yield batch
                del batch  # while the next is made, its memory is the caller's to free


def _put_raw(reader: Reader, packing: Packing, pixels: Tensor) -> None:
    for index, begin, end in packing.places():
        if reader.modes[index] != JPEG:
            decode_to_tensor(pixels[begin:end], reader, index)


class _Decoder:
    """Hold a pipeline and what is under way in it; build another when DALI has given it up over a bad image."""

    def __init__(self, reader: Reader, *, workers: int, device: torch.device) -> None:
        self.reader, self.workers, self.device = reader, workers, device
        self.pipeline = build(workers=workers, device=device)
        self._told = False

    def begin(self, chunk: _Chunk) -> None:
        """Hand the bytes of a chunk to the pipeline."""
        if len(chunk.places):
            indices = chunk.packing.rows.indices[chunk.places].tolist()
            payloads = [np.frombuffer(self.reader.payload(index), np.uint8) for index in indices]
            self.pipeline.feed_input("payloads", payloads)
            self.pipeline.schedule_run()

    def end(self, chunk: _Chunk, pixels: Tensor, under_way: Iterable[_Chunk]) -> BadSamples:
        """Copy the images of the oldest chunk to their places in `pixels`; return those that do not decode."""
        if not len(chunk.places):
            return []
        try:
            return self._take(chunk, pixels)
        except RuntimeError:
            self.pipeline = build(workers=self.workers, device=self.device)
            faults = [fault for place in chunk.places for fault in self._alone(chunk.packing, place, pixels)]
        for after in under_way:
            self.begin(after)
        return faults

    def _take(self, chunk: _Chunk, pixels: Tensor) -> BadSamples:
        """Copy the images of the oldest run; raise RuntimeError where DALI refuses one, and does not say which."""
        (images,) = self.pipeline.share_outputs()
        faults: BadSamples = []
        shapes = images.shape()
        for number, place in enumerate(chunk.places.tolist()):
            packing, (height, width, _) = chunk.packing, shapes[number]
            index = int(packing.rows.indices[place])
            if (height, width) == tuple(packing.sizes[place]):
                target = pixels[packing.begins[place] : packing.ends[place]].view(height, width, 3)
                if pixels.is_cuda:
                    target.copy_(from_dlpack(images[number]))
                else:  # torch would split each image between its threads, which the decoders keep busy
                    np.copyto(target.numpy(), np.asarray(images[number]))
            else:
                faults.append((index, size_mismatch(self.reader, index, height=height, width=width)))
        if pixels.is_cuda:
            torch.cuda.current_stream().synchronize()  # DALI takes its buffers back
        self.pipeline.release_outputs()
        return faults

    def _alone(self, packing: Packing, place: np.int64, pixels: Tensor) -> BadSamples:
        """Decode one image of a refused run, so that no image's pixels depend on its neighbours.

        Where DALI refuses it, libjpeg decodes it, or says what is wrong with it.
        """
        chunk = _Chunk(packing, packing.rows.indices[:0], np.array([place]), is_last=False)
        self.begin(chunk)
        try:
            return self._take(chunk, pixels)
        except RuntimeError as refusal:
            self.pipeline = build(workers=self.workers, device=self.device)
            index = int(packing.rows.indices[place])
            try:
                decode_to_tensor(pixels[packing.begins[place] : packing.ends[place]], self.reader, index)
            except BetonError as fault:
                return [(index, BetonError(str(fault)))]  # one without frames, which would keep the pixels alive
            if not self._told:
                log.warning("DALI refuses JPEGs that libjpeg decodes, and the latter's pixels are taken: %s", refusal)
                self._told = True
            return []


def build(*, workers: int, device: torch.device) -> Pipeline:
    """Build the pipeline: whole images as stored, without the rotation EXIF asks for, which no other loader makes.

    Fancy upsampling is what libjpeg-turbo does by default, and what the CPU decoder of DALI does, too.
    """
    is_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=CHUNK_IMAGES,
        num_threads=workers,
        device_id=device.index if is_gpu else None,
        prefetch_queue_depth=CHUNKS,
        exec_dynamic=True,
        exec_pipelined=False,  # each run is scheduled here; pipelined, the first call would ask for CHUNKS at once
    )
    with pipeline:
        payloads = fn.external_source(name="payloads", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            payloads,
            device="mixed" if is_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline
