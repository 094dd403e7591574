"""Know how a view is drawn (a pure function of seed, epoch, sample and view) and made from packed pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import philox
from fastbyol.config import ViewConfig
from fastbyol.kernels import reference

BLOCKS = 4  # Philox calls per view, four words each; word k of a view always decides the same thing
ORDERS = np.array(list(permutations(range(4))))  # [24, 4]
CHUNK_PIXELS = 2**19  # of source or of views at a time: bounds temporaries to a few times 6 MB


@dataclass(frozen=True)
class ViewParams:
    """Hold every draw of V views of B images as one float32 tensor, so that one copy moves it to the device.

    packed: [V, B, 18]. Whole numbers (pixels, flags, orders) are exact in float32.
    """

    packed: Tensor

    @property
    def boxes(self) -> Tensor:
        """[V, B, 4]: top, left, height, width of the crop in source pixels."""
        return self.packed[..., 0:4]

    @property
    def flip(self) -> Tensor:
        """[V, B] bool: mirror left to right."""
        return self.packed[..., 4] > 0

    @property
    def jitter(self) -> Tensor:
        """[V, B] bool: apply the four colour operations."""
        return self.packed[..., 5] > 0

    @property
    def grayscale(self) -> Tensor:
        """[V, B] bool."""
        return self.packed[..., 6] > 0

    @property
    def blur(self) -> Tensor:
        """[V, B] bool."""
        return self.packed[..., 7] > 0

    @property
    def solarize(self) -> Tensor:
        """[V, B] bool."""
        return self.packed[..., 8] > 0

    @property
    def sigma(self) -> Tensor:
        """[V, B]: blur, in pixels of the view."""
        return self.packed[..., 9]

    @property
    def factors(self) -> Tensor:
        """[V, B, 4]: brightness (added), contrast (factor), saturation (factor), hue (added, in circles)."""
        return self.packed[..., 10:14]

    @property
    def order(self) -> Tensor:
        """[V, B, 4]: which colour operation comes first, second, third, last; a permutation of 0..3."""
        return self.packed[..., 14:18]

    def to(self, device: torch.device | str) -> ViewParams:
        """Return the parameters on the device; the copy does not wait when `packed` is pinned."""
        return ViewParams(self.packed.to(device, non_blocking=True))


def draw(
    views: tuple[ViewConfig, ViewConfig],
    *,
    seed: int,
    epochs: NDArray[np.int64],
    indices: NDArray[np.int64],
    sizes: NDArray[np.integer],
) -> ViewParams:
    """Draw the parameters of both views of B samples.

    epochs: [B] in [0, 2**32); indices: [B] >= 0; sizes: [B, 2] (H, W) pixels; seed in [0, 2**64). A sample's parameters
    depend on the seed, the view and its own epoch, index and size, never on the batch it came in. The crop's sides are
    rounded to whole pixels, its position is uniform over all that fit.
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


def apply(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    params: ViewParams,
    *,
    crop_px: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make the views: crop, flip, jitter, grayscale, blur, solarize, clip, normalise.

    pixels: [bytes] uint8, RGB images H W C of any sizes; offsets: [B] int64, an image's first byte; sizes: [B, 2]
    (H, W); all tensors on one device. Result: [V*B, 3, crop_px, crop_px] channels_last, all of view 0, then all of
    view 1.
    """
    view_count, image_count, _ = params.packed.shape
    out = empty_views(view_count, image_count, crop_px, dtype=dtype, device=pixels.device)
    working = working_dtype(dtype)
    for part in chunks(sizes, pixels_per_image=view_count * crop_px**2):
        p = ViewParams(params.packed[:, part])
        x = reference.random_resized_crop(
            pixels, offsets[part], sizes[part], p.boxes, p.flip, crop_px=crop_px, dtype=working
        )
        x = reference.color_jitter(x, p.factors.flatten(0, 1).to(working), p.order.flatten(0, 1), p.jitter.flatten())
        x = reference.grayscale(x, p.grayscale.flatten())
        x = reference.gaussian_blur(x, p.sigma.flatten().to(working), p.blur.flatten())
        x = reference.solarize(x, p.solarize.flatten())
        reference.normalize(x.view(view_count, -1, *x.shape[1:]), out=out[:, part])
    return out.flatten(0, 1)


def center_view(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    *,
    crop_px: int,
    margin: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make the evaluation view [B, 3, crop_px, crop_px], channels_last: the centre square, resampled and normalised.

    The square's side is margin * short side, rounded. 224 / 256 is the paper's protocol (short side 256, centre 224) in
    one resampling; 1 takes the whole centre square. No antialias, as in training and in the authors' evaluation.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"margin is {margin}; give the part of the short side to keep, above 0 and at most 1")
    height, width = sizes.long().unbind(1)
    side = (torch.minimum(height, width) * margin).round().long().clamp(min=1)
    boxes = torch.stack(((height - side) // 2, (width - side) // 2, side, side), 1)[None]
    flip = torch.zeros_like(boxes[..., 0], dtype=torch.bool)
    out = empty_views(1, len(sizes), crop_px, dtype=dtype, device=pixels.device)
    for part in chunks(sizes, pixels_per_image=crop_px**2):
        x = reference.random_resized_crop(
            pixels,
            offsets[part],
            sizes[part],
            boxes[:, part],
            flip[:, part],
            crop_px=crop_px,
            dtype=working_dtype(dtype),
        )
        reference.normalize(x, out=out[0, part])
    return out[0]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Compute in float32 whatever narrower dtype is asked for."""
    return torch.promote_types(dtype, torch.float32)


def empty_views(view_count: int, image_count: int, crop_px: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate [V, B, 3, crop_px, crop_px] that flattens to a channels_last tensor."""
    return torch.empty(view_count, image_count, crop_px, crop_px, 3, dtype=dtype, device=device).movedim(-1, 2)


def chunks(sizes: Tensor, *, pixels_per_image: int) -> Iterator[slice]:
    """Split B images so that neither their padded sources nor their views pass CHUNK_PIXELS; at least one at a time."""
    if not len(sizes):
        return
    source_pixels = int(sizes.amax(0).long().prod())  # syncs
    step = max(1, CHUNK_PIXELS // max(source_pixels, pixels_per_image))
    for start in range(0, len(sizes), step):
        yield slice(start, start + step)
