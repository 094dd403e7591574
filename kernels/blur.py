"""Separable Gaussian blur of images x [N, 3, H, H] in [0, 1], and the kernel that writes finished views.

    down     u[y, x] = sum_t g_t x[y + t, x]                  where blur is drawn; other images return at once
    across   v[y, x] = clip(sum_t g_t u[y, x + t], 0, 1)      where blur is drawn; v = x elsewhere
    finish   (v' - mean) / std, channels last                 v' = min(v, 1 - v) where solarize is drawn, else v

|t| <= H // 20, g_t is proportional to exp(-t^2 / (2 sigma^2)) and sums to 1 before the border cuts it (zero padding).
There are two launches: down, then across with finish. Moved per element: one read and one write of blurred images by
down, and one of each by finish. Other taps come from the cache: rows above and below in 128-bit words; neighbours in
the same row, which are not aligned to words, one per thread, so that a warp reads one line. The interleaved stores of a
warp fill 192 or 384 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels.color import unit
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.kernels.view_params import BLUR, COLUMNS, SIGMA, SOLARIZE, ViewParams

DOWN_BLOCK = 2048  # elements per program: 8 per thread
DOWN_WARPS = 8
FINISH_BLOCK = 256  # pixels per program: 1 per thread
FINISH_WARPS = 8
SIGMAS = tl.constexpr(6.0)  # taps farther away have less than 2**-25 of the centre's weight, which a float32 sum loses
MEAN = tl.constexpr(IMAGENET_MEAN)
STD = tl.constexpr(IMAGENET_STD)


@triton.jit
def _inside(pixel, AREA: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether pixels exist: a constant where blocks divide the area, so that no load has to ask."""
    if AREA % BLOCK == 0:
        return tl.full([BLOCK], True, tl.int1)
    return pixel < AREA


@triton.jit
def _reach_and_exponent(params_ptr, RADIUS: tl.constexpr):
    """Return the number of taps per side that count, and the factor of a tap's squared distance in the exponent."""
    sigma = tl.load(params_ptr + SIGMA)
    return tl.minimum((sigma * SIGMAS).to(tl.int32) + 1, RADIUS), -0.5 / (sigma * sigma)


@triton.jit
def blur_down_kernel(
    planes_ptr,  # [N, 3, SIDE, SIDE]
    params_ptr,  # [N, COLUMNS] float32
    out_ptr,  # like planes; only the blurred images are written
    SIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    area: tl.constexpr = SIDE * SIDE
    blocks: tl.constexpr = (area + BLOCK - 1) // BLOCK
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    params_ptr += plane // 3 * COLUMNS
    if not (tl.load(params_ptr + BLUR) > 0):
        return
    reach, exponent = _reach_and_exponent(params_ptr, RADIUS)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = _inside(pixel, area, BLOCK)
    plane_ptr = planes_ptr + plane * area
    total = tl.load(plane_ptr + pixel, mask=inside, other=0.0).to(tl.float32)
    weights = 1.0
    for t in range(1, reach + 1):
        weight = tl.exp(exponent * (t * t))
        weights += 2.0 * weight
        above, below = pixel - t * SIDE, pixel + t * SIDE  # outside the plane exactly where the row is
        up = tl.load(plane_ptr + above, mask=inside & (above >= 0), other=0.0).to(tl.float32)
        down = tl.load(plane_ptr + below, mask=below < area, other=0.0).to(tl.float32)
        total += weight * (up + down)
    tl.store(out_ptr + plane * area + pixel, total / weights, mask=inside)


@triton.jit
def _beside(pixel_ptr, t, has_left, has_right):
    """Return the sum of the pixels t to the left and to the right."""
    left = tl.load(pixel_ptr - t, mask=has_left, other=0.0).to(tl.float32)
    right = tl.load(pixel_ptr + t, mask=has_right, other=0.0).to(tl.float32)
    return left + right


@triton.jit
def _across(red_ptr, x, inside, r, g, b, params_ptr, SIDE: tl.constexpr, RADIUS: tl.constexpr):
    """Return the blurred channels; r, g, b are the values at red_ptr and at the other two channels."""
    reach, exponent = _reach_and_exponent(params_ptr, RADIUS)
    weights = 1.0
    for t in tl.range(1, reach + 1, loop_unroll_factor=2):  # twelve loads in flight instead of six
        weight = tl.exp(exponent * (t * t))
        weights += 2.0 * weight
        has_left, has_right = inside & (x >= t), inside & (x < SIDE - t)
        r += weight * _beside(red_ptr, t, has_left, has_right)
        g += weight * _beside(red_ptr + SIDE * SIDE, t, has_left, has_right)
        b += weight * _beside(red_ptr + 2 * SIDE * SIDE, t, has_left, has_right)
    return unit(r / weights), unit(g / weights), unit(b / weights)


@triton.jit
def finish_kernel(
    planes_ptr,  # [N, 3, SIDE, SIDE]
    down_ptr,  # like planes, blurred downwards where blur is drawn
    params_ptr,  # [N, COLUMNS] float32
    out_ptr,  # [N, SIDE, SIDE, 3]
    SIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    area: tl.constexpr = SIDE * SIDE
    blocks: tl.constexpr = (area + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // blocks).to(tl.int64)
    params_ptr += image * COLUMNS
    is_blurred = tl.load(params_ptr + BLUR) > 0
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = _inside(pixel, area, BLOCK)
    source_ptr = planes_ptr
    if is_blurred:
        source_ptr = down_ptr
    red_ptr = source_ptr + image * (3 * area) + pixel
    r = tl.load(red_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(red_ptr + area, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(red_ptr + 2 * area, mask=inside, other=0.0).to(tl.float32)
    if is_blurred:
        r, g, b = _across(red_ptr, pixel % SIDE, inside, r, g, b, params_ptr, SIDE, RADIUS)
    if tl.load(params_ptr + SOLARIZE) > 0:
        r, g, b = tl.minimum(r, 1.0 - r), tl.minimum(g, 1.0 - g), tl.minimum(b, 1.0 - b)
    out_ptr += (image * area + pixel) * 3
    tl.store(out_ptr, (r - MEAN[0]) * (1 / STD[0]), mask=inside)
    tl.store(out_ptr + 1, (g - MEAN[1]) * (1 / STD[1]), mask=inside)
    tl.store(out_ptr + 2, (b - MEAN[2]) * (1 / STD[2]), mask=inside)


def blur_down(planes: Tensor, params: ViewParams, *, block: int = DOWN_BLOCK) -> Tensor:
    """Return planes [N, 3, H, H] blurred along their columns where drawn; other images are undefined."""
    images, _, side, _ = planes.shape
    out = torch.empty_like(planes)
    grid = (images * 3 * triton.cdiv(side**2, block),)
    blur_down_kernel[grid](planes, params.packed, out, SIDE=side, RADIUS=side // 20, BLOCK=block, num_warps=DOWN_WARPS)
    return out


def finish(planes: Tensor, down: Tensor, params: ViewParams, *, out: Tensor, block: int = FINISH_BLOCK) -> None:
    """Blur along rows where drawn, solarize where drawn, normalise; out: [N, 3, H, H] floating, channels last."""
    images, _, side, _ = planes.shape
    grid = (images * triton.cdiv(side**2, block),)
    finish_kernel[grid](
        planes,
        down,
        params.packed,
        out,
        SIDE=side,
        RADIUS=side // 20,
        BLOCK=block,
        num_warps=FINISH_WARPS,
    )
