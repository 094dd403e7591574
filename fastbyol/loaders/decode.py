"""Decoding of one stored image: raw bytes are copied, a JPEG is decoded by libjpeg-turbo."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import jpeg
from fastbyol.beton import RAW, BetonError, Reader


def decode_into(out: NDArray[np.uint8], reader: Reader, index: int) -> None:
    """Write the pixels of a sample to out [height * width * 3]; raise BetonError naming it where it does not decode."""
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
