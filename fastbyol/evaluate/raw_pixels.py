"""The pixels of an image as its representation: the baseline that asks what an encoder adds to its input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.model.parts import Encoder

SIDE = 32  # px at most: larger images are averaged down to it, since neighbours are searched in three times its square


class RawPixels(Encoder):
    """An encoder without weights: images [N, 3, px, px] to their pixels [N, features], at most SIDE to a side."""

    def __init__(self, px: int) -> None:
        super().__init__()
        self.side = min(px, SIDE)
        self.config, self.features = EncoderConfig(), 3 * self.side**2

    def forward(self, images: Tensor) -> Tensor:
        """Average the pixels down and flatten them."""
        return F.adaptive_avg_pool2d(images, self.side).flatten(1)
