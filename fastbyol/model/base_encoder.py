"""The base class of encoders."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.kernels.reference import IMAGENET_STD, LUMA
from fastbyol.model.batchnorm import set_views_


class Encoder(nn.Module):
    """The base class of encoders: images [N, 3, H, W] to representations [N, features].

    Subclasses set `config` and `features`, the length of a representation, and define forward. A run builds one with
    views=2, or as many as its recipe has: in train mode N is then V*B, view-major, and each batch norm of
    fastbyol.model.batchnorm takes its statistics per view. Otherwise a batch is one population, of any size.
    """

    config: EncoderConfig
    features: int

    def set_recompute(self, enabled: bool) -> None:
        """Choose whether the backward recomputes cheap activations or keeps them; an encoder may have none."""

    def feature_map(self, images: Tensor) -> Tensor:  # noqa: ARG002
        """Map images [N, 3, H, W] to the last feature map [N, features, h, w]; raise ConfigError where none exists."""
        raise ConfigError(f"encoder {self.config.arch} has no feature map; give a protocol other than segment")

    def multiply_adds(self, *, px: int) -> int | None:  # noqa: ARG002
        """Count the multiply-adds of one image of px pixels a side; None where they are not known."""
        return None

    def take_channels(self, images: Tensor) -> Tensor:
        """Return gray images [N, 1, H, W] of normalised RGB images where the encoder takes one channel, else the same.

        Their mean and std are the weighted ones of the channels, so that gray is a weighted mean of normalised RGB.
        """
        if self.config.channels == images.shape[1] or images.shape[1] != 3:
            return images
        spread = [weight * std for weight, std in zip(LUMA, IMAGENET_STD, strict=True)]
        red, green, blue = (x * (each / sum(spread)) for x, each in zip(images.chunk(3, 1), spread, strict=True))
        return torch.add(red + green, blue)

    def with_views(self, views: int) -> Encoder:
        """Return a copy whose batch norms take a batch as this many views."""
        copied = copy.deepcopy(self)
        set_views_(copied, views)
        return copied
