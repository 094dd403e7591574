"""Decoding of one stored image: raw bytes are copied, a JPEG is decoded by libjpeg-turbo, and either may be resized."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import jpeg
from fastbyol.beton import RAW, BetonError, Reader
from fastbyol.loaders.resized import ResizedReader, resize


def decode_into(out: NDArray[np.uint8], reader: Reader, index: int) -> None:
    """Write the pixels of a sample to out [height * width * 3]; raise BetonError naming it where it does not decode."""
    if isinstance(reader, ResizedReader):
        _decode_resized(out, reader, index)
        return
    payload = reader.payload(index)
    if reader.modes[index] == RAW:
        out[:] = np.frombuffer(payload, np.uint8)
        return
    try:
        height, width = jpeg.decode_into(out, payload)
    except ValueError as error:
        raise unreadable_jpeg(reader, index, str(error)) from error
    if (height, width) != (reader.heights[index], reader.widths[index]):
        raise size_mismatch(reader, index, height=height, width=width)


def _decode_resized(out: NDArray[np.uint8], reader: ResizedReader, index: int) -> None:
    """Decode a sample in its stored size, and resize it to out."""
    stored = reader.stored
    wanted, size = ((int(each.heights[index]), int(each.widths[index]), 3) for each in (reader, stored))
    if wanted == size:
        decode_into(out, stored, index)
        return
    whole = np.empty(size, np.uint8)
    decode_into(whole.reshape(-1), stored, index)
    resize(whole, out.reshape(wanted))


def decode_to_tensor(out: Tensor, reader: Reader, index: int) -> None:
    """Write the pixels of a sample to a tensor on any device; otherwise as decode_into."""
    host = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
    decode_into(host.numpy(), reader, index)
    if host is not out:
        out.copy_(host)


def unreadable_jpeg(reader: Reader, index: int, reason: str) -> BetonError:
    """Return the error of a sample that is not a readable JPEG."""
    return BetonError(
        f"{reader.path}: {reader.describe(index)} is not a readable JPEG ({reason}); "
        "run fastbyol-prep verify and write the file anew"
    )


def size_mismatch(reader: Reader, index: int, *, height: int, width: int) -> BetonError:
    """Return the error of a JPEG whose size differs from its record's."""
    recorded = (int(reader.heights[index]), int(reader.widths[index]))
    return BetonError(
        f"{reader.path}: {reader.describe(index)} decodes to {(height, width)} pixels, its record says {recorded}; "
        "write the file anew with fastbyol-prep"
    )
