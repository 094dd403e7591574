"""The random parameters of a batch's views in one tensor, which one copy moves to the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

# First columns of a view's row. As tl.constexpr, since kernels may read no other kind of module constant.
BOX = tl.constexpr(0)  # top, left, height, width
FLIP = tl.constexpr(4)
JITTER = tl.constexpr(5)
GRAYSCALE = tl.constexpr(6)
BLUR = tl.constexpr(7)
SOLARIZE = tl.constexpr(8)
SIGMA = tl.constexpr(9)
FACTORS = tl.constexpr(10)  # of brightness, contrast, saturation, hue
ORDER = tl.constexpr(14)
COLUMNS = tl.constexpr(18)

# The colour operations' numbers, in FACTORS and in ORDER.
BRIGHTNESS = tl.constexpr(0)
CONTRAST = tl.constexpr(1)
SATURATION = tl.constexpr(2)
HUE = tl.constexpr(3)


@dataclass(frozen=True)
class ViewParams:
    """All random parameters of V views of B images in one float32 tensor.

    packed: [V, B, 18]. Whole numbers (pixels, flags, orders) are exact in float32.
    """

    packed: Tensor

    @staticmethod
    def crops_only(boxes: Tensor) -> ViewParams:
        """Return parameters of one view per image with crop boxes [B, 4] and no other operation."""
        return ViewParams(F.pad(boxes.float(), (BOX.value, COLUMNS.value - BOX.value - 4))[None])

    @property
    def boxes(self) -> Tensor:
        """[V, B, 4]: top, left, height, width of the crop in source pixels."""
        return self._columns(BOX.value, 4)

    @property
    def flip(self) -> Tensor:
        """[V, B] bool: mirror left to right."""
        return self._flag(FLIP.value)

    @property
    def jitter(self) -> Tensor:
        """[V, B] bool: apply the four colour operations."""
        return self._flag(JITTER.value)

    @property
    def grayscale(self) -> Tensor:
        """[V, B] bool."""
        return self._flag(GRAYSCALE.value)

    @property
    def blur(self) -> Tensor:
        """[V, B] bool."""
        return self._flag(BLUR.value)

    @property
    def solarize(self) -> Tensor:
        """[V, B] bool."""
        return self._flag(SOLARIZE.value)

    @property
    def sigma(self) -> Tensor:
        """[V, B]: blur, in pixels of the view."""
        return self.packed[..., SIGMA.value]

    @property
    def factors(self) -> Tensor:
        """[V, B, 4]: brightness (added), contrast (factor), saturation (factor), hue (added, in circles)."""
        return self._columns(FACTORS.value, 4)

    @property
    def order(self) -> Tensor:
        """[V, B, 4]: the colour operations in the order applied, a permutation of 0..3."""
        return self._columns(ORDER.value, 4)

    def to(self, device: torch.device | str) -> ViewParams:
        """Return the parameters on the device; the copy does not wait when `packed` is pinned."""
        return ViewParams(self.packed.to(device, non_blocking=True))

    def _columns(self, first: int, count: int) -> Tensor:
        return self.packed[..., first : first + count]

    def _flag(self, column: int) -> Tensor:
        return self.packed[..., column] > 0
