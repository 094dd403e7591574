"""Loader nvjpeg: JPEGs decoded by a GPU's own JPEG decoders, through nvJPEG, straight to the batch on the GPU."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from ctypes import c_uint, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import JPEG, BetonError, Reader
from fastbyol.errors import ConfigError
from fastbyol.loaders import libnvjpeg
from fastbyol.loaders.batch import PREFETCH, Batch, host_tensor, pack
from fastbyol.loaders.decode import decode_into
from fastbyol.loaders.libnvjpeg import Image, Library, NvJpegError, Status
from fastbyol.loaders.nvjpeg_headers import Headers
from fastbyol.loaders.prefetch import prefetch_in_thread
from fastbyol.loaders.stand_ins import BadSamples, StandIns
from fastbyol.order import Rows
from fastbyol.system.device import HostCopy

IN_FLIGHT = 2  # batches: the host prepares one while the GPU decodes the other
MARK_BYTES = 12  # at the end of each image, to see that it was written
OF_AN_IMAGE = (  # statuses for which other images may be at fault as little as the library
    Status.INVALID_PARAMETER,
    Status.BAD_JPEG,
    Status.JPEG_NOT_SUPPORTED,
    Status.EXECUTION_FAILED,
    Status.IMPLEMENTATION_NOT_SUPPORTED,
    Status.INCOMPLETE_BITSTREAM,
)

log = logging.getLogger(__name__)


def load(
    reader: Reader,
    batches: Iterable[Rows],
    *,
    workers: int,  # noqa: ARG001  # one signature for all loaders
    prefetch: int = PREFETCH,
    on_error: str = "fail",
    device: torch.device | str = "cpu",
    processes: int = 1,  # noqa: ARG001
) -> Generator[Batch, None, None]:
    """Yield the decoded batches in the given order, decoded on `device`, up to `prefetch` in advance, by one thread.

    Pixels are near those of loader native; see docs/numerics.md. Images that the hardware does not decode are decoded
    by libjpeg in the same thread, and the first of each kind is named in a warning. Damaged data that the hardware
    decodes without an error, with wrong pixels, is not noticed. Memory of the GPU: see batches_on_gpu(). Raises
    ConfigError for another device than a GPU, and where nvJPEG is missing or finds no decoder.
    """
    target = torch.device(device)
    if target.type != "cuda":
        raise ConfigError(
            f"--loader nvjpeg decodes on a GPU, and the device is {target.type}; give --loader native, or --device cuda"
        )
    library = libnvjpeg.open_library()
    with torch.cuda.device(target):
        torch.cuda.synchronize()  # makes the GPU this thread's for nvJPEG too, which has a CUDA runtime of its own
        decoder = Decoder(library, target)
    stand_ins = StandIns(reader, on_error=on_error)
    return prefetch_in_thread(assemble(reader, batches, stand_ins, decoder), prefetch=prefetch, device=target)


def decoding_threads(reader: Reader, *, workers: int) -> int | None:  # noqa: ARG001
    """Return None: one thread prepares what the GPU decodes, and more are not used."""
    return None


def batches_on_gpu(*, prefetch: int) -> int:
    """Count the batches for which load() needs memory of the GPU beside the one that it handed on.

    For each in flight nvJPEG has as much again, at most: its planes.
    """
    return prefetch + 2 * IN_FLIGHT


def assemble(
    reader: Reader, batches: Iterable[Rows], stand_ins: StandIns, decoder: Decoder
) -> Generator[Batch, None, None]:
    """Yield the batches, whose pixels are complete, while the next one is decoded; close the decoder at the end."""
    source, idle, pending = iter(batches), deque(decoder.slots), deque[_Slot]()

    def submit() -> None:
        rows = next(source, None)
        if rows is not None:
            pending.append(idle.popleft())
            pending[-1].submit(reader, *stand_ins.substitute(rows))

    try:
        for _ in decoder.slots:
            submit()
        while pending:
            slot = pending.popleft()
            batch = slot.finish(reader, stand_ins)
            idle.append(slot)
            submit()
            yield batch
            del batch  # so that only the caller holds it while the next is made
    finally:
        decoder.close()


class Decoder:
    """nvJPEG with a GPU's JPEG decoders, and a slot for each batch in flight.

    Raises ConfigError where the GPU has none, or the driver does not suit the library.
    """

    def __init__(self, library: Library, device: torch.device) -> None:
        self.device = device
        resources = ExitStack()  # which keeps no reference to this object
        self.close = weakref.finalize(self, resources.close)
        handle, engines, cores = c_void_p(), c_uint(), c_uint()
        flags = libnvjpeg.UPSAMPLING_WITH_INTERPOLATION
        try:
            library.nvjpegCreateEx(libnvjpeg.BACKEND_HARDWARE, None, None, flags, handle)
            resources.callback(library.nvjpegDestroy, handle)
            library.nvjpegGetHardwareDecoderInfo(handle, engines, cores)
        except NvJpegError as error:
            self.close()
            raise ConfigError(_no_decoder(library, device, str(error))) from error
        if not engines.value:
            self.close()
            raise ConfigError(_no_decoder(library, device, "it has no engine"))
        log.info("nvJPEG %s decodes by %d engines of %d cores", library.version(), engines.value, cores.value)
        headers = Headers(library, handle, resources)
        self.slots = [_Slot(library, handle, headers, device, resources) for _ in range(IN_FLIGHT)]


def _no_decoder(library: Library, device: torch.device, reason: str) -> str:
    """Say that the hardware cannot be used."""
    return (
        f"--loader nvjpeg: nvJPEG {library.version()} finds no JPEG decoder in {device} ({reason}); A100, A30, H100 "
        "and later GPUs of their kind have one, and the driver must know this library's CUDA; give --loader native"
    )


class _Slot:
    """A batch in flight: nvJPEG's state, a stream, and all that has to live until its images are decoded.

    nvJPEG writes an image when it is called, even if work queued on its stream before has not ended (on an H100,
    meta-pytorch/torchcodec#1634). So the host waits for that work, which is little, and hands on complete pixels.
    """

    def __init__(
        self, library: Library, handle: c_void_p, headers: Headers, device: torch.device, resources: ExitStack
    ) -> None:
        self._library, self._handle, self._headers, self._device = library, handle, headers, device
        self._state, self._initialized = c_void_p(), 0  # images of a batch for which the state is prepared
        library.nvjpegJpegStateCreate(handle, self._state)
        resources.callback(library.nvjpegJpegStateDestroy, self._state)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        resources.callback(self._stream.synchronize)
        self._free = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._staging = self._pinned(0)
        self._arguments: tuple[object, ...] = ()

    def submit(self, reader: Reader, rows: Rows, skipped: NDArray[np.int64]) -> None:
        """Start decoding a batch; skipped: the samples that were replaced before."""
        self._packing, self._skipped, self._bad = pack(reader, rows), skipped, BadSamples()
        with torch.cuda.stream(self._stream):
            self._pixels = torch.empty(self._packing.buffer_bytes(), dtype=torch.uint8, device=self._device)
            self._pixels[self._packing.image_bytes() :] = 0
            self._on_host = self._stage(reader)
            self._places = [place for place in range(len(rows.indices)) if place not in self._on_host]
            positions, marks = self._mark()
            self._on_host |= self._decode(self._places)
            for place, reason in self._on_host.items():
                self._decode_on_host(reader, place, reason)
            self._is_written = HostCopy((self._pixels[positions] != marks).any(1))

    def finish(self, reader: Reader, stand_ins: StandIns) -> Batch:
        """Wait for the batch and return it, decoded anew with stand-ins where samples are bad."""
        while bad := self._collect(reader):
            for index, error in bad:
                stand_ins.find(index, error)
            rows, skipped = stand_ins.substitute(self._packing.rows)
            self.submit(reader, rows, np.concatenate([self._skipped, skipped]))
        batch = self._packing.batch(reader, self._pixels, skipped=self._skipped)
        del self._pixels
        return batch

    def _collect(self, reader: Reader) -> BadSamples:
        """Wait for the images, decode those that the hardware left out, and return the bad samples."""
        written = zip(self._places, self._is_written.read(), strict=True)
        left_out = [place for place, is_written in written if not is_written and place not in self._on_host]
        with torch.cuda.stream(self._stream):
            for place in left_out:
                self._decode_on_host(reader, place, "the hardware did not write it")
            if left_out:
                self._wait()
        return self._bad

    def _stage(self, reader: Reader) -> dict[int, str]:
        """Copy the JPEGs to pinned memory; return the places of images for the host, and why ("" for a raw one)."""
        indices = self._packing.rows.indices
        self._lengths = np.where(reader.modes[indices] == JPEG, reader.sizes[indices], 0)
        self._ends = np.cumsum(self._lengths)
        if self._ends[-1] > len(self._staging):
            self._staging = self._pinned(int(self._ends[-1] * 1.25))
        staging, begin, on_host = self._staging.numpy(), 0, dict[int, str]()
        address, view = self._staging.data_ptr(), staging.data
        samples = zip(indices.tolist(), self._packing.sizes.tolist(), self._ends.tolist(), strict=True)
        for place, (index, (height, width), end) in enumerate(samples):
            if begin == end:
                on_host[place] = ""
                continue
            staging[begin:end] = np.frombuffer(reader.payload(index), np.uint8)
            reason = self._headers.fault(index, view[begin:end], address + begin, height=height, width=width)
            if reason:
                on_host[place] = reason
            begin = end
        return on_host

    def _mark(self) -> tuple[Tensor, Tensor]:
        """Write 0 and 255 by turns to the last bytes of images; return where, and what, both [images, MARK_BYTES]."""
        places = np.asarray(self._places, np.int64)
        begins, ends = self._packing.begins[places, None], self._packing.ends[places, None]
        positions = np.maximum(ends - 1 - np.arange(MARK_BYTES), begins)
        where = host_tensor(positions, like=self._pixels).to(self._device, non_blocking=True)
        marks = (where % 2 * 255).to(torch.uint8)
        self._pixels[where] = marks
        return where, marks

    def _decode(self, places: Sequence[int]) -> dict[int, str]:
        """Let the hardware decode images; return the places of those that it refuses, found by halves, and why."""
        if not places:
            return {}
        self._wait()
        try:
            self._decode_batch(np.asarray(places))
        except NvJpegError as error:
            self._initialized = 0
            if error.status not in OF_AN_IMAGE:
                raise
            if len(places) == 1:
                return {places[0]: str(error)}
            half = len(places) // 2
            return self._decode(places[:half]) | self._decode(places[half:])
        return {}

    def _decode_batch(self, places: NDArray[np.int64]) -> None:
        """Start decoding the staged JPEGs at these places."""
        count = len(places)
        if self._initialized != count:
            self._library.nvjpegDecodeBatchedInitialize(self._handle, self._state, count, 1, libnvjpeg.OUTPUT_RGBI)
            self._initialized = count
        lengths = self._lengths[places].astype(np.uintp)
        addresses = (self._staging.data_ptr() + self._ends[places] - self._lengths[places]).astype(np.uintp)
        images = (Image * count)()
        table = np.frombuffer(memoryview(images).cast("B"), np.uintp).reshape(count, 2, libnvjpeg.MAX_COMPONENT)
        table[:, 0, 0] = self._pixels.data_ptr() + self._packing.begins[places]
        table[:, 1, 0] = 3 * self._packing.sizes[places, 1]
        self._arguments = (lengths, addresses, images)
        self._library.nvjpegDecodeBatched(
            *(self._handle, self._state, addresses.ctypes.data, lengths.ctypes.data, images, self._stream.cuda_stream)
        )

    def _decode_on_host(self, reader: Reader, place: int, reason: str) -> None:
        """Decode an image by libjpeg, or copy a raw one, to its place; note it where it does not decode."""
        ((index, begin, end),) = self._packing.places(place, place + 1)
        host = self._pinned(end - begin)
        try:
            decode_into(host.numpy(), reader, index)
        except BetonError as error:
            self._bad.append((index, BetonError(str(error))))  # a copy without frames, which would keep memory alive
            return
        self._pixels[begin:end].copy_(host, non_blocking=True)
        if reason:
            self._headers.refuse(reader, index, reason)

    def _wait(self) -> None:
        """Wait for the stream's work; the thread sleeps meanwhile."""
        self._free.record()
        self._free.synchronize()

    def _pinned(self, size: int) -> Tensor:
        """Allocate memory of the host, from which copies to a GPU are queued."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
