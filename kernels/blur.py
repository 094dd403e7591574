"""Separable Gaussian blur of images x [N, 3, H, H] in [0, 1], and the kernel that writes finished views.

    down     u[y, x] = sum_t g_t x[y + t, x]                  where blur is drawn; other images return at once
    across   v[y, x] = clip(sum_t g_t u[y, x + t], 0, 1)      where blur is drawn; v = x elsewhere
    finish   (v' - mean) / std, channels last                 v' = min(v, 1 - v) where solarize is drawn, else v

|t| <= H // 20, g_t is proportional to exp(-t^2 / (2 sigma^2)) and sums to 1 before the border cuts it (zero padding).
There are two launches: down, then across with finish. Down writes its result with columns and rows exchanged, so that
both passes read their taps, which lie in the lines above and below, in 128-bit words. Moved per element: one read and
one write of blurred images by down, and one of each by finish; other taps come from the cache. The interleaved stores
of a warp fill 192 or 384 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels.color import unit
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.kernels.view_params import BLUR, COLUMNS, SIGMA, SOLARIZE, ViewParams

TILE = 32  # rows and columns of a program: 8 pixels per thread
WARPS = 4
SIGMAS = tl.constexpr(6.0)  # taps farther away have less than 2**-25 of the centre's weight, which a float32 sum loses
MEAN = tl.constexpr(IMAGENET_MEAN)
STD = tl.constexpr(IMAGENET_STD)


@triton.jit
def _place(number, SIDE: tl.constexpr, TILE: tl.constexpr):
    """Return the image or plane of a program, and the first line and column of its tile."""
    across: tl.constexpr = (SIDE + TILE - 1) // TILE
    tile = number % (across * across)
    return (number // (across * across)).to(tl.int64), tile // across * TILE, tile % across * TILE


@triton.jit
def _inside(line, column, SIDE: tl.constexpr, TILE: tl.constexpr):
    """Return whether pixels exist: a constant where tiles divide the side, so that no load has to ask."""
    if SIDE % TILE == 0:
        return tl.full([TILE, TILE], True, tl.int1)
    return (line < SIDE) & (column < SIDE)


@triton.jit
def _reach_and_exponent(params_ptr, RADIUS: tl.constexpr):
    """Return the number of taps per side that count, and the factor of a tap's squared distance in the exponent."""
    sigma = tl.load(params_ptr + SIGMA)
    return tl.minimum((sigma * SIGMAS).to(tl.int32) + 1, RADIUS), -0.5 / (sigma * sigma)


@triton.jit
def _two_taps(pixel_ptr, t, has_above, has_below, SIDE: tl.constexpr):
    """Return the sum of the pixels t lines above and below, 0 where there is none."""
    above = tl.load(pixel_ptr - t * SIDE, mask=has_above, other=0.0).to(tl.float32)
    below = tl.load(pixel_ptr + t * SIDE, mask=has_below, other=0.0).to(tl.float32)
    return above + below


@triton.jit
def blur_down_kernel(
    planes_ptr,  # [N, 3, SIDE, SIDE]
    params_ptr,  # [N, COLUMNS] float32
    out_ptr,  # like planes, columns before rows; only the blurred images are written
    SIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
):
    plane, top, left = _place(tl.program_id(0), SIDE, TILE)
    params_ptr += plane // 3 * COLUMNS
    if not (tl.load(params_ptr + BLUR) > 0):
        return
    reach, exponent = _reach_and_exponent(params_ptr, RADIUS)
    y = top + tl.arange(0, TILE)[:, None]
    x = left + tl.arange(0, TILE)[None, :]
    inside = _inside(y, x, SIDE, TILE)
    pixel_ptr = planes_ptr + plane * (SIDE * SIDE) + y * SIDE + x
    total = tl.load(pixel_ptr, mask=inside, other=0.0).to(tl.float32)
    weights = 1.0
    for t in range(1, reach + 1):
        weight = tl.exp(exponent * (t * t))
        weights += 2.0 * weight
        total += weight * _two_taps(pixel_ptr, t, inside & (y >= t), inside & (y < SIDE - t), SIDE)
    y = top + tl.arange(0, TILE)[None, :]
    x = left + tl.arange(0, TILE)[:, None]
    exchanged_ptr = out_ptr + plane * (SIDE * SIDE) + x * SIDE + y
    tl.store(exchanged_ptr, tl.trans(total / weights), mask=_inside(x, y, SIDE, TILE))


@triton.jit
def _across(down_ptr, first, params_ptr, SIDE: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr):
    """Return a tile of the three channels blurred along rows, as [row, column], from planes [column, row]."""
    top, left = first
    area: tl.constexpr = SIDE * SIDE
    x = left + tl.arange(0, TILE)[:, None]
    y = top + tl.arange(0, TILE)[None, :]
    inside = _inside(x, y, SIDE, TILE)
    red_ptr = down_ptr + x * SIDE + y
    r = tl.load(red_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(red_ptr + area, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(red_ptr + 2 * area, mask=inside, other=0.0).to(tl.float32)
    reach, exponent = _reach_and_exponent(params_ptr, RADIUS)
    weights = 1.0
    for t in range(1, reach + 1):
        weight = tl.exp(exponent * (t * t))
        weights += 2.0 * weight
        has_left, has_right = inside & (x >= t), inside & (x < SIDE - t)
        r += weight * _two_taps(red_ptr, t, has_left, has_right, SIDE)
        g += weight * _two_taps(red_ptr + area, t, has_left, has_right, SIDE)
        b += weight * _two_taps(red_ptr + 2 * area, t, has_left, has_right, SIDE)
    r, g, b = unit(r / weights), unit(g / weights), unit(b / weights)
    return tl.trans(r), tl.trans(g), tl.trans(b)


@triton.jit
def finish_kernel(
    planes_ptr,  # [N, 3, SIDE, SIDE]
    down_ptr,  # like planes, blurred downwards where blur is drawn, columns before rows
    params_ptr,  # [N, COLUMNS] float32
    out_ptr,  # [N, SIDE, SIDE, 3]
    SIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
):
    area: tl.constexpr = SIDE * SIDE
    image, top, left = _place(tl.program_id(0), SIDE, TILE)
    params_ptr += image * COLUMNS
    y = top + tl.arange(0, TILE)[:, None]
    x = left + tl.arange(0, TILE)[None, :]
    inside = _inside(y, x, SIDE, TILE)
    if tl.load(params_ptr + BLUR) > 0:
        r, g, b = _across(down_ptr + image * (3 * area), (top, left), params_ptr, SIDE, RADIUS, TILE)
    else:
        red_ptr = planes_ptr + image * (3 * area) + y * SIDE + x
        r = tl.load(red_ptr, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(red_ptr + area, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(red_ptr + 2 * area, mask=inside, other=0.0).to(tl.float32)
    if tl.load(params_ptr + SOLARIZE) > 0:
        r, g, b = tl.minimum(r, 1.0 - r), tl.minimum(g, 1.0 - g), tl.minimum(b, 1.0 - b)
    out_ptr += image * (3 * area) + (y * SIDE + x) * 3
    tl.store(out_ptr, (r - MEAN[0]) * (1 / STD[0]), mask=inside)
    tl.store(out_ptr + 1, (g - MEAN[1]) * (1 / STD[1]), mask=inside)
    tl.store(out_ptr + 2, (b - MEAN[2]) * (1 / STD[2]), mask=inside)


def blur_down(planes: Tensor, params: ViewParams, *, tile: int = TILE) -> Tensor:
    """Return planes [N, 3, H, H] blurred along their columns where drawn, as [N, 3, column, row].

    Other images are undefined.
    """
    images, _, side, _ = planes.shape
    out = torch.empty_like(planes)
    grid = (images * 3 * triton.cdiv(side, tile) ** 2,)
    blur_down_kernel[grid](planes, params.packed, out, SIDE=side, RADIUS=side // 20, TILE=tile, num_warps=WARPS)
    return out


def finish(planes: Tensor, down: Tensor, params: ViewParams, *, out: Tensor, tile: int = TILE) -> None:
    """Blur along rows where drawn, solarize where drawn, normalise; out: [N, 3, H, H] floating, channels last.

    down: what blur_down returned.
    """
    images, _, side, _ = planes.shape
    grid = (images * triton.cdiv(side, tile) ** 2,)
    constants = {"SIDE": side, "RADIUS": side // 20, "TILE": tile}
    finish_kernel[grid](planes, down, params.packed, out, **constants, num_warps=WARPS)
