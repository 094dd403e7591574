"""Color jitter and grayscale of planar images x [N, 3, H, H] in [0, 1], each with its own order of operations.

    brightness  x + delta                                   contrast  x * f + mean * (1 - f), mean of the whole channel
    saturation  value - min(f, value / chroma) * (value - x)
    hue         value - chroma * clip(|position - primary| - 1, 0, 1) on a circle of 6, position turned by 6 * delta
    grayscale   0.2989 r + 0.5870 g + 0.1140 b

Contrast needs the mean of its input. So the crop kernel applies the operations before contrast, with `jitter`, and
writes the sums of its tiles, [N, 3, T] float32. The color kernel adds them in a fixed order and applies contrast and
the operations after it, in place. Programs of images with neither jitter nor grayscale return at once. Moved per
element of the others: one read and one write, and T / (H*H) sums per program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels.reference import LUMA
from fastbyol.kernels.view_params import (
    COLUMNS,
    CONTRAST,
    FACTORS,
    GRAYSCALE,
    HUE,
    JITTER,
    ORDER,
    SATURATION,
    ViewParams,
)

BLOCK = 1024  # pixels per program: 8 per thread, one 128-bit access of float16 per channel
WARPS = 4
OPERATIONS = tl.constexpr(4)
TINY = tl.constexpr(2.0**-126)  # smallest normal float32: avoids a division by a chroma of 0
LUMA_RED, LUMA_GREEN, LUMA_BLUE = (tl.constexpr(weight) for weight in LUMA)


@triton.jit
def unit(x):
    """Clip to [0, 1]."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _value_and_chroma(r, g, b):
    value = tl.maximum(tl.maximum(r, g), b)
    return value, value - tl.minimum(tl.minimum(r, g), b)


@triton.jit
def _saturation(r, g, b, factor):
    value, chroma = _value_and_chroma(r, g, b)
    gain = tl.minimum(value / tl.maximum(chroma, TINY), factor)
    return unit(value - gain * (value - r)), unit(value - gain * (value - g)), unit(value - gain * (value - b))


@triton.jit
def _at_primary(position, PRIMARY: tl.constexpr, value, chroma):
    """Return the channel whose primary is at PRIMARY on a circle of circumference 6."""
    distance = position - PRIMARY
    distance = tl.abs(distance - 6.0 * tl.floor(distance * (1 / 6) + 0.5))
    return value - chroma * unit(distance - 1.0)


@triton.jit
def _hue(r, g, b, delta):
    value, chroma = _value_and_chroma(r, g, b)
    from_red = 1.0 + (g + b - r - value + chroma) / tl.maximum(chroma, TINY)
    position = tl.where(g >= b, from_red, -from_red) + 6.0 * delta
    red = _at_primary(position, 0, value, chroma)
    green = _at_primary(position, 2, value, chroma)
    return red, green, _at_primary(position, 4, value, chroma)


@triton.jit
def jitter(r, g, b, params_ptr, position):
    """Apply the operation at a position of the image's order, except contrast; params_ptr points to the image's row."""
    operation = tl.load(params_ptr + ORDER + position).to(tl.int32)
    factor = tl.load(params_ptr + FACTORS + operation)
    if operation == HUE:
        r, g, b = _hue(r, g, b, factor)
    elif operation == SATURATION:
        r, g, b = _saturation(r, g, b, factor)
    else:  # brightness
        r, g, b = unit(r + factor), unit(g + factor), unit(b + factor)
    return r, g, b


@triton.jit
def contrast_position(params_ptr):
    """Return the position of contrast in the image's order."""
    position = 0
    for i in tl.static_range(1, OPERATIONS):
        position += i * (tl.load(params_ptr + ORDER + i).to(tl.int32) == CONTRAST).to(tl.int32)
    return position


@triton.jit
def _contrast(x, factor, sums_ptr, AREA: tl.constexpr, TILES: tl.constexpr, TILES_POW2: tl.constexpr):
    tile = tl.arange(0, TILES_POW2)
    mean = tl.sum(tl.load(sums_ptr + tile, mask=tile < TILES, other=0.0)) * (1 / AREA)
    return unit(x * factor + mean * (1.0 - factor))


@triton.jit
def color_kernel(
    planes_ptr,  # [N, 3, AREA], in place
    sums_ptr,  # [N, 3, TILES] float32
    params_ptr,  # [N, COLUMNS] float32
    AREA: tl.constexpr,
    TILES: tl.constexpr,
    TILES_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (AREA + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // blocks).to(tl.int64)
    params_ptr += image * COLUMNS
    is_jittered = tl.load(params_ptr + JITTER) > 0
    is_gray = tl.load(params_ptr + GRAYSCALE) > 0
    if not (is_jittered or is_gray):
        return
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < AREA
    red_ptr = planes_ptr + image * (3 * AREA) + pixel
    r = tl.load(red_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(red_ptr + AREA, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(red_ptr + 2 * AREA, mask=inside, other=0.0).to(tl.float32)
    if is_jittered:
        factor = tl.load(params_ptr + FACTORS + CONTRAST)
        sums_ptr += image * (3 * TILES)
        r = _contrast(r, factor, sums_ptr, AREA, TILES, TILES_POW2)
        g = _contrast(g, factor, sums_ptr + TILES, AREA, TILES, TILES_POW2)
        b = _contrast(b, factor, sums_ptr + 2 * TILES, AREA, TILES, TILES_POW2)
        for position in range(contrast_position(params_ptr) + 1, OPERATIONS):
            r, g, b = jitter(r, g, b, params_ptr, position)
    if is_gray:
        r = r * LUMA_RED + g * LUMA_GREEN + b * LUMA_BLUE
        g = r
        b = r
    tl.store(red_ptr, r, mask=inside)
    tl.store(red_ptr + AREA, g, mask=inside)
    tl.store(red_ptr + 2 * AREA, b, mask=inside)


def color_(planes: Tensor, sums: Tensor, params: ViewParams) -> None:
    """Apply contrast, the operations after it and grayscale in place.

    planes: [N, 3, H, H]; sums: [N, 3, T] float32, the sums of T tiles of each channel; params: N rows.
    """
    images, _, side, _ = planes.shape
    tiles = sums.shape[2]
    grid = (images * triton.cdiv(side**2, BLOCK),)
    color_kernel[grid](
        planes,
        sums,
        params.packed,
        AREA=side**2,
        TILES=tiles,
        TILES_POW2=triton.next_power_of_2(tiles),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
