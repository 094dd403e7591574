"""Name what every loader yields: decoded images of one batch, packed in one buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Hold B decoded images of any sizes.

    indices, epochs: int64 [B]; labels: int64 [B], or None where the file has none; pixels: uint8 [bytes], RGB rows of
    all images one after the other; offsets: int64 [B], where in `pixels` each image begins; sizes: int64 [B, 2],
    height and width.
    """

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
