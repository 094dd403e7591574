"""Know how to decode batches ahead of training, with threads: a beton's JPEG bytes to packed pixels, once an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from fastbyol.beton import RAW, BetonError, Reader
from fastbyol.loaders import Batch
from fastbyol.order import Rows


def decode(reader: Reader, rows: Rows) -> Batch:
    """Decode the images of `rows` into one packed buffer; raise BetonError naming a sample that does not decode."""
    sizes = np.stack([reader.heights[rows.indices], reader.widths[rows.indices]], axis=1)
    lengths = sizes.prod(axis=1) * 3
    ends = np.cumsum(lengths)
    pixels = np.empty(ends[-1], np.uint8)
    for index, begin, end, size in zip(rows.indices, ends - lengths, ends, sizes, strict=True):
        _decode_into(pixels[begin:end].reshape(*size, 3), reader, int(index))
    labels = None if reader.labels is None else reader.labels[rows.indices]
    packed = torch.from_numpy(pixels)
    return Batch(rows.indices, rows.epochs, labels, packed, torch.from_numpy(ends - lengths), torch.from_numpy(sizes))


def _decode_into(image: NDArray[np.uint8], reader: Reader, index: int) -> None:
    payload = reader.payload(index)
    if reader.modes[index] == RAW:
        image[:] = np.frombuffer(payload, np.uint8).reshape(image.shape)
        return
    try:
        decoded = simplejpeg.decode_jpeg(payload, "RGB", buffer=image)
    except ValueError as error:
        raise BetonError(
            f"{reader.path}: sample {index} is not a readable JPEG ({error}); "
            "run fastbyol-prep verify and write the file anew"
        ) from error
    if decoded.shape != image.shape:
        raise BetonError(
            f"{reader.path}: sample {index} decodes to {decoded.shape[:2]} pixels, its record says {image.shape[:2]}; "
            "write the file anew with fastbyol-prep"
        )


def load(reader: Reader, batches: Iterable[Rows], *, workers: int, ahead: int = 2) -> Generator[Batch, None, None]:
    """Yield the decoded batches in the order given, while `workers` threads decode up to workers + `ahead` in advance.

    Memory is bounded by that many batches. An error of a worker is raised here, at its batch's turn. Closing the
    generator ends the threads.
    """
    source = iter(batches)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for rows in islice(source, workers + ahead):
                pending.append(pool.submit(decode, reader, rows))
            while pending:
                batch = pending.popleft().result()
                for rows in islice(source, 1):
                    pending.append(pool.submit(decode, reader, rows))
                yield batch
        finally:
            for future in pending:
                future.cancel()
