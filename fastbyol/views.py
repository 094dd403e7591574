"""Random views: parameters drawn as a pure function of (seed, epoch, sample, view), and views of packed pixels."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import philox
from fastbyol.config import ViewConfig
from fastbyol.kernels.augment import augment
from fastbyol.kernels.view_params import ViewParams

BLOCKS = 4  # Philox calls per view, four words each; word k of a view always sets the same parameter
ORDERS = np.array(list(permutations(range(4))))  # [24, 4]

apply = augment  # draw() and apply() are one pair: whoever draws parameters needs no other import


def draw(
    views: tuple[ViewConfig, ...],
    *,
    seed: int,
    epochs: NDArray[np.int64],
    indices: NDArray[np.int64],
    sizes: NDArray[np.integer],
) -> ViewParams:
    """Draw the parameters of the V views of B samples.

    epochs: [B] in [0, 2**32); indices: [B] >= 0; sizes: [B, 2] (H, W) pixels; seed in [0, 2**64). A sample's parameters
    depend only on the seed, the view and the sample's epoch, index and size, not on the batch it is in. The crop's
    sides are rounded to whole pixels; its position is uniform over all that fit.
    """
    counter = np.empty((len(views), len(indices), BLOCKS, 4), dtype=np.uint32)
    counter[..., 0] = (indices & 0xFFFFFFFF)[:, None]
    counter[..., 1] = (indices >> 32)[:, None]
    counter[..., 2] = epochs[:, None]
    counter[..., 3] = np.arange(len(views) * BLOCKS).reshape(len(views), 1, BLOCKS)
    u = philox.uniform(philox.philox4x32(counter, philox.key_of(seed))).astype(np.float64)
    u = u.reshape(len(views), len(indices), BLOCKS * 4)
    packed = [view_columns(view, u[v], sizes) for v, view in enumerate(views)]
    return ViewParams(torch.from_numpy(np.stack(packed).astype(np.float32)))


def view_columns(view: ViewConfig, u: NDArray[np.float64], sizes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Turn uniforms u [B, 16] into the columns of ViewParams, [B, 18]."""
    height, width = sizes[:, 0], sizes[:, 1]
    area = (view.area[0] + u[:, 0] * (view.area[1] - view.area[0])) * height * width
    log_ratio = np.log(view.ratio[0]) + u[:, 1] * (np.log(view.ratio[1]) - np.log(view.ratio[0]))
    ratio = np.exp(log_ratio)
    crop_width = np.clip(np.rint(np.sqrt(area * ratio)), 1, width)
    crop_height = np.clip(np.rint(np.sqrt(area / ratio)), 1, height)
    top = np.floor(u[:, 2] * (height - crop_height + 1))
    left = np.floor(u[:, 3] * (width - crop_width + 1))
    flags = u[:, 4:9] < (view.flip, view.jitter, view.grayscale, view.blur, view.solarize)
    sigma = view.sigma[0] + u[:, 9] * (view.sigma[1] - view.sigma[0])
    strength = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    factors = (2 * u[:, 10:14] - 1) * strength + (0, 1, 1, 0)
    order = ORDERS[np.floor(u[:, 14] * len(ORDERS)).astype(np.int64)]
    return np.column_stack((top, left, crop_height, crop_width, flags, sigma, factors, order))


def params_of_crops(params: ViewParams, *, crop_px: int) -> ViewParams:
    """Return the parameters with which apply() finishes V*B images that are already cropped, but not flipped.

    params: [V, B, 18]. Result: [1, V*B, 18], the same except that each box is the whole crop.
    """
    packed = params.packed.flatten(0, 1)[None].clone()
    packed[:, :, :4] = torch.tensor([0, 0, crop_px, crop_px])
    return ViewParams(packed)


def center_view(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    *,
    crop_px: int,
    margin: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the evaluation view [B, 3, crop_px, crop_px], channels_last: the centre square, resampled and normalised.

    The square's side is margin * short side, rounded. margin 224 / 256 is the paper's protocol (short side 256, centre
    224) in one resampling; 1 takes the whole centre square. No antialias, as in training and the authors' evaluation.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"margin is {margin}; give the part of the short side to keep, above 0 and at most 1")
    height, width = sizes.long().unbind(1)
    side = (torch.minimum(height, width) * margin).round().long().clamp(min=1)
    boxes = torch.stack(((height - side) // 2, (width - side) // 2, side, side), 1)
    return augment(pixels, offsets, sizes, ViewParams.crops_only(boxes), crop_px=crop_px, dtype=dtype)
