"""Layout of a batch's images in one packed buffer, and the buffer's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.order import Rows

PREFETCH = 2  # batches decoded in advance


@dataclass(frozen=True)
class Batch:
    """B decoded images of any sizes, in one buffer.

    indices, epochs: int64 [B]; labels: int64 [B], or None where the file has none; pixels: uint8 [bytes], read-only,
    the contiguous RGB rows of every image; offsets: int64 [B], the first byte of each image in `pixels`; sizes: int64
    [B, 2], height and width; offsets and sizes are on the host. skipped: int64 [S], the requested samples that do not
    decode, each replaced by the next sample of the file that does.
    """

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    skipped: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


class Packing(NamedTuple):
    """The images of `rows` one after the other: sizes [B, 2] (H, W), first bytes and ends [B], all int64."""

    rows: Rows
    sizes: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]

    def empty(self, device: torch.device | str = "cpu") -> Tensor:
        """Allocate the buffer on the host, for copies to `device`: uint8 [buffer_bytes()].

        For a GPU it is pinned memory of torch's caching allocator: new buffers cost nothing once a few exist, and none
        is reused before the copies queued from it are done. For a CPU numpy allocates it, in huge pages where large.
        """
        size = self.buffer_bytes()
        if torch.device(device).type == "cpu":
            pixels = torch.from_numpy(np.empty(size, np.uint8))
        else:
            pixels = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pixels[self.image_bytes() :] = 0
        return pixels

    def places(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield sample, first byte and end of the images at places first .. end - 1 of the batch."""
        part = slice(first, end)
        return zip(self.rows.indices[part].tolist(), self.begins[part].tolist(), self.ends[part].tolist(), strict=True)

    def image_bytes(self) -> int:
        """Count the bytes of the images."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def buffer_bytes(self) -> int:
        """Count the bytes of the buffer: those of the images, and spare bytes as if the widest image were the last.

        reference.unpack_planes reads that far, and copies a buffer that ends earlier.
        """
        widths = self.sizes[:, 1]
        return self.image_bytes() + 3 * int((widths.max() - widths[-1]) if len(widths) else 0)

    def batch(self, reader: Reader, pixels: Tensor, *, skipped: NDArray[np.int64]) -> Batch:
        """Return the filled buffer as a Batch."""
        labels = None if reader.labels is None else reader.labels[self.rows.indices]
        offsets, sizes = host_tensor(self.begins, like=pixels), host_tensor(self.sizes, like=pixels)
        return Batch(self.rows.indices, self.rows.epochs, labels, pixels, offsets, sizes, skipped)


def pack(reader: Reader, rows: Rows) -> Packing:
    """Lay out the rows' images by the sizes in the file."""
    sizes = np.stack([reader.heights[rows.indices], reader.widths[rows.indices]], axis=1)
    lengths = sizes.prod(axis=1) * 3
    ends = np.cumsum(lengths)
    return Packing(rows, sizes, ends - lengths, ends)


def max_batch_bytes(reader: Reader, *, batch_size: int) -> int:
    """Return the most bytes that a batch's buffer can take: those of the largest images of the file.

    A batch that ends one epoch and begins the next may hold an image twice.
    """
    pixels = reader.heights * reader.widths
    times = (batch_size - 2) // len(pixels) + 2
    count = min(-(-batch_size // times), len(pixels))
    largest = np.partition(pixels, len(pixels) - count)[-count:]
    return 3 * (times * int(largest.sum()) + int(reader.widths.max()))


def host_tensor(values: NDArray[np.int64], *, like: Tensor) -> Tensor:
    """Return the values as a tensor on the host, pinned if `like` is pinned or on a GPU."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if like.is_cuda or like.is_pinned() else tensor
