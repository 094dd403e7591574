"""Loader dali: whole images decoded by NVIDIA DALI, on the GPU where there is one.

DALI neither draws nor crops: views come from the same kernels and the same random draws as with every other loader.
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
from fastbyol.loaders.batch import PREFETCH, Batch, Packing, pack
from fastbyol.loaders.decode import decode_to_tensor, size_mismatch
from fastbyol.loaders.prefetch import prefetch_in_thread
from fastbyol.loaders.stand_ins import BadSamples, StandIns
from fastbyol.order import Rows

CHUNK_IMAGES = 64  # in a run of the pipeline
CHUNKS = 3  # in the pipeline at a time

log = logging.getLogger(__name__)


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
    """Yield the decoded batches in the given order, by DALI with `workers` threads, up to `prefetch` in advance.

    On the CPU the pixels are those of loader native. On a GPU DALI's mixed decoder leaves them on the device. Beside
    the batches, memory holds the images of CHUNKS runs. DALI decodes some JPEGs with a few wrong bits, where the other
    loaders raise; images that DALI refuses are tried by libjpeg.
    """
    stand_ins = StandIns(reader, on_error=on_error)
    return prefetch_in_thread(
        _assemble(reader, batches, stand_ins, workers, torch.device(device)), prefetch=prefetch, device=device
    )


def decoding_threads(reader: Reader, *, workers: int) -> int | None:  # noqa: ARG001
    """Return the number of decoding threads: `workers`."""
    return workers


class _Chunk(NamedTuple):
    """One run: places in a batch whose images are JPEGs; none for a batch of raw images only."""

    packing: Packing
    skipped: NDArray[np.int64]
    places: NDArray[np.int64]
    is_last: bool


def _chunks(reader: Reader, batches: Iterable[Rows], stand_ins: StandIns) -> Iterator[_Chunk]:
    """Split batches into runs of the pipeline; none spans two batches."""
    for requested in batches:
        rows, skipped = stand_ins.substitute(requested)
        packing = pack(reader, rows)
        places = np.flatnonzero(reader.modes[rows.indices] == JPEG)
        parts = np.array_split(places, max(-(-len(places) // CHUNK_IMAGES), 1))
        for number, part in enumerate(parts, 1):
            yield _Chunk(packing, skipped, part, is_last=number == len(parts))


def _assemble(
    reader: Reader, batches: Iterable[Rows], stand_ins: StandIns, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Assemble batches from the pipeline's images and the raw images, which need no decoder."""

    def empty(packing: Packing) -> Tensor:
        return torch.zeros(packing.buffer_bytes(), dtype=torch.uint8, device=device)

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    decoder = _Decoder(reader, workers=workers, device=device)
    chunks = _chunks(reader, batches, stand_ins)
    submitted = deque(islice(chunks, CHUNKS))
    for chunk in submitted:
        decoder.submit(chunk)
    pixels, bad = None, BadSamples()
    with torch.cuda.stream(stream):  # so that copies do not wait for training steps; no effect without a GPU
        while submitted:
            chunk = submitted.popleft()
            if pixels is None:
                pixels = empty(chunk.packing)
            bad += decoder.collect(chunk, pixels, submitted)
            for next_chunk in islice(chunks, 1):
                submitted.append(next_chunk)
                decoder.submit(next_chunk)
            if chunk.is_last:
                _copy_raw(reader, chunk.packing, pixels)
                batch = stand_ins.make_batch(chunk.packing, pixels, bad, empty=empty, skipped=chunk.skipped)
                if stream is not None:
                    stream.synchronize()
                pixels, bad = None, BadSamples()
                yield batch
                del batch  # so that only the caller holds it while the next is made


def _copy_raw(reader: Reader, packing: Packing, pixels: Tensor) -> None:
    for index, begin, end in packing.places():
        if reader.modes[index] != JPEG:
            decode_to_tensor(pixels[begin:end], reader, index)


class _Decoder:
    """A pipeline and its runs; a new pipeline is built when a bad image has made DALI give up the old one."""

    def __init__(self, reader: Reader, *, workers: int, device: torch.device) -> None:
        self.reader, self.workers, self.device = reader, workers, device
        self.pipeline = build(workers=workers, device=device)
        self._has_warned = False

    def submit(self, chunk: _Chunk) -> None:
        """Start decoding a chunk."""
        if len(chunk.places):
            indices = chunk.packing.rows.indices[chunk.places].tolist()
            payloads = [np.frombuffer(self.reader.payload(index), np.uint8) for index in indices]
            self.pipeline.feed_input("payloads", payloads)
            self.pipeline.schedule_run()

    def collect(self, chunk: _Chunk, pixels: Tensor, submitted: Iterable[_Chunk]) -> BadSamples:
        """Copy the images of the oldest chunk to their places in `pixels`; return those that do not decode."""
        if not len(chunk.places):
            return []
        try:
            return self._copy_oldest(chunk, pixels)
        except RuntimeError:
            self.pipeline = build(workers=self.workers, device=self.device)
            bad = [sample for place in chunk.places for sample in self._decode_alone(chunk.packing, place, pixels)]
        for later in submitted:
            self.submit(later)
        return bad

    def _copy_oldest(self, chunk: _Chunk, pixels: Tensor) -> BadSamples:
        """Copy the images of the oldest run; raise RuntimeError where DALI refuses one, without saying which."""
        (images,) = self.pipeline.share_outputs()
        bad: BadSamples = []
        shapes = images.shape()
        for number, place in enumerate(chunk.places.tolist()):
            packing, (height, width, _) = chunk.packing, shapes[number]
            index = int(packing.rows.indices[place])
            if (height, width) == tuple(packing.sizes[place]):
                target = pixels[packing.begins[place] : packing.ends[place]].view(height, width, 3)
                if pixels.is_cuda:
                    target.copy_(from_dlpack(images[number]))
                else:  # torch would split each image among its threads, whose cores the decoders keep busy
                    np.copyto(target.numpy(), np.asarray(images[number]))
            else:
                bad.append((index, size_mismatch(self.reader, index, height=height, width=width)))
        if pixels.is_cuda:
            torch.cuda.current_stream().synchronize()  # DALI takes its buffers back
        self.pipeline.release_outputs()
        return bad

    def _decode_alone(self, packing: Packing, place: np.int64, pixels: Tensor) -> BadSamples:
        """Decode one image of a refused run by itself, so that no image's pixels depend on its neighbours.

        Where DALI refuses it, libjpeg decodes it or says what is wrong with it.
        """
        chunk = _Chunk(packing, packing.rows.indices[:0], np.array([place]), is_last=False)
        self.submit(chunk)
        try:
            return self._copy_oldest(chunk, pixels)
        except RuntimeError as refusal:
            self.pipeline = build(workers=self.workers, device=self.device)
            index = int(packing.rows.indices[place])
            try:
                decode_to_tensor(pixels[packing.begins[place] : packing.ends[place]], self.reader, index)
            except BetonError as error:
                return [(index, BetonError(str(error)))]  # a copy without frames, which would keep the pixels alive
            if not self._has_warned:
                log.warning("DALI refuses JPEGs that libjpeg decodes; libjpeg's pixels are used: %s", refusal)
                self._has_warned = True
            return []


def build(*, workers: int, device: torch.device) -> Pipeline:
    """Build the pipeline: whole images as stored, without EXIF rotation, like every other loader.

    Fancy upsampling is the default of libjpeg-turbo and of DALI's CPU decoder.
    """
    is_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=CHUNK_IMAGES,
        num_threads=workers,
        device_id=device.index if is_gpu else None,
        prefetch_queue_depth=CHUNKS,
        exec_dynamic=True,
        exec_pipelined=False,  # runs are scheduled one by one; pipelined, the first call would want CHUNKS at once
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
