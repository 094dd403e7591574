"""Know how to decode a whole file once, keep it as uint8 in RAM or on the GPU, and serve batches without decoding."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastbyol.beton import Reader
from fastbyol.config import ConfigError
from fastbyol.loaders import AHEAD, Batch, native
from fastbyol.loaders.packing import Packing, pack
from fastbyol.loaders.ram import available_bytes
from fastbyol.order import Rows

RAM_SHARE = 0.9  # of what is available
GPU_SHARE = 0.5  # of what is free before training, which still wants its own
DECODED_TOGETHER = 256
GIB = 2**30

log = logging.getLogger(__name__)


def load(
    reader: Reader,
    batches: Iterable[Rows],
    *,
    workers: int,
    ahead: int = AHEAD,
    on_error: str = "fail",
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Decode the file now, then yield the batches in the order given.

    The pixels rest on `device` if they fit there, and a batch is then the whole of them with the offsets of its images:
    nothing is copied. Otherwise they rest in RAM, and a batch for a GPU is gathered into a pinned buffer. Raises
    ConfigError when they fit nowhere, and BetonError for a sample that does not decode, here and not at its batch.
    """
    packing = _whole(reader)
    place = _place(reader, packing, torch.device(device))
    pixels, sources = _decode_all(reader, packing, place, workers=workers, ahead=ahead, on_error=on_error)
    serve = _in_place if place == torch.device(device) else _gathered
    return serve(reader, batches, packing, pixels, sources)


def _whole(reader: Reader) -> Packing:
    """Lay out all samples in the order of the file."""
    indices = np.arange(len(reader), dtype=np.int64)
    return pack(reader, Rows(indices, np.zeros_like(indices)))


def _place(reader: Reader, packing: Packing, device: torch.device) -> torch.device:
    """Choose where the decoded file rests: the device, else the host; raise ConfigError when it fits on neither."""
    size = packing.buffer_bytes()
    host = torch.device("cpu")
    if device != host:
        free, _ = torch.cuda.mem_get_info(device)
        if size <= GPU_SHARE * free:
            return device
        log.warning(
            "decoded, %s takes %.1f GiB, more than %.0f %% of the %.1f GiB free on %s: it is kept in RAM and copied",
            *(reader.path, size / GIB, 100 * GPU_SHARE, free / GIB, device),
        )
    available = available_bytes()
    if size > RAM_SHARE * available:
        raise ConfigError(
            f"decoded, {reader.path} takes {size / GIB:.1f} GiB; {available / GIB:.1f} GiB of RAM are available, of "
            f"which loader memory takes up to {RAM_SHARE:.0%}; give --loader native, or write smaller images"
        )
    return host


def _decode_all(
    reader: Reader, packing: Packing, place: torch.device, *, workers: int, ahead: int, on_error: str
) -> tuple[Tensor, NDArray[np.int64]]:
    """Decode every sample to `place`; return the pixels and, for each sample, the one that stands for it."""
    pixels = torch.zeros(packing.buffer_bytes(), dtype=torch.uint8, device=place)
    sources = packing.rows.indices.copy()
    parts = np.array_split(sources.copy(), -(-len(sources) // DECODED_TOGETHER))
    asked = [Rows(part, np.zeros_like(part)) for part in parts]
    with (
        closing(native.load(reader, asked, workers=workers, ahead=ahead, on_error=on_error)) as decoded,
        tqdm(total=len(sources), desc=f"decoding {reader.path.name}", unit="images", delay=2, disable=None) as bar,
    ):
        for part, batch in zip(parts, decoded, strict=True):
            sources[part] = batch.indices
            if not len(batch.skipped):
                begin, end = int(packing.begins[part[0]]), int(packing.ends[part[-1]])
                pixels[begin:end] = batch.pixels[: end - begin]
            else:
                _copy_each(pixels, packing, batch, part)
            bar.update(len(part))
    return pixels, sources


def _copy_each(pixels: Tensor, packing: Packing, batch: Batch, asked: NDArray[np.int64]) -> None:
    """Copy the images of a batch in which stand-ins disturb the layout; the place of a bad sample stays unused."""
    for place, index in enumerate(asked.tolist()):
        if batch.indices[place] == index:
            begin, end, first = int(packing.begins[index]), int(packing.ends[index]), int(batch.offsets[place])
            pixels[begin:end] = batch.pixels[first : first + end - begin]


def _in_place(
    reader: Reader, batches: Iterable[Rows], packing: Packing, pixels: Tensor, sources: NDArray[np.int64]
) -> Generator[Batch, None, None]:
    """Serve batches that point into the resident pixels."""
    for rows in batches:
        indices = sources[rows.indices]
        part = Packing(
            Rows(indices, rows.epochs), packing.sizes[indices], packing.begins[indices], packing.ends[indices]
        )
        yield part.batch(reader, pixels, skipped=rows.indices[indices != rows.indices])


def _gathered(
    reader: Reader, batches: Iterable[Rows], packing: Packing, pixels: Tensor, sources: NDArray[np.int64]
) -> Generator[Batch, None, None]:
    """Serve batches copied together in pinned memory, for a GPU that the file does not fit on."""
    gather = _gather_equal if (packing.sizes == packing.sizes[0]).all() else _gather
    for rows in batches:
        indices = sources[rows.indices]
        part = pack(reader, Rows(indices, rows.epochs))
        buffer = part.empty("cuda")
        gather(pixels, packing, part, buffer)
        yield part.batch(reader, buffer, skipped=rows.indices[indices != rows.indices])


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
