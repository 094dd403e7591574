"""Layers of stride 2 that pad as TensorFlow and JAX do with SAME: by the side they get, more at its end.

A side n becomes ceil(n / stride). Of the zeros it takes, max((ceil(n / stride) - 1) stride + kernel - n, 0), half lie
before the image, rounded down, and the others after it. At stride 1 that is the usual symmetric padding, at stride
2 of an even side it is not: the windows lie one pixel further on. Source: TensorFlow's notes on padding of tf.nn, and
jax.lax.padtype_to_pads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def pad_same(x: Tensor, *, kernel: int, stride: int) -> Tensor:
    """Return x [N, C, H, W] with the zeros around it that SAME takes for a square window."""
    top, bottom = _zeros(x.shape[2], kernel, stride)
    left, right = _zeros(x.shape[3], kernel, stride)
    return F.pad(x, (left, right, top, bottom))


def _zeros(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after a side."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A square convolution without bias, padded so."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)  # the padding of an odd side

    def forward(self, images: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, ceil(H/stride), ceil(W/stride)]."""
        stride, dilation = self.stride[0], self.dilation[0]
        window = dilation * (self.kernel_size[0] - 1) + 1
        return F.conv2d(pad_same(images, kernel=window, stride=stride), self.weight, None, stride, 0, dilation)


class SameMaxPool2d(nn.MaxPool2d):
    """Max pooling 3x3, stride 2, of values of at least 0, padded so."""

    def __init__(self) -> None:
        super().__init__(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, ceil(H/2), ceil(W/2)]."""
        return F.max_pool2d(pad_same(x, kernel=3, stride=2), 3, 2)


class SameNormedMaxPool(SameMaxPool2d):
    """The same pooling of a batch norm with ReLU; returns its result twice, once per consumer."""

    def forward(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # the norm before it, too
        """Map [N, C, H, W] to [N, C, ceil(H/2), ceil(W/2)]."""
        pooled = super().forward(norm(x))
        return pooled, pooled


def padded_convolution(inputs: int, outputs: int, kernel: int, stride: int, *, padding: str) -> nn.Conv2d:
    """Build a square convolution without bias; padding: symmetric or same, which differ at stride 2 alone."""
    if padding == "same" and stride > 1 and kernel > 1:
        return SameConv2d(inputs, outputs, kernel, stride)
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
