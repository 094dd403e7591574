"""Crops of packed uint8 images to planar squares: bicubic resampling, flip, and the jitter before contrast.

    out[i] = clip(sum_j w_j pixel[base - 1 + j] / 255, 0, 1), j = 0..3, in y and in x
    base + t = (i + 1/2) * length / H - 1/2, base whole and 0 <= t < 1;  w = Keys' cubic (a = -1/2) of t

Positions are whole multiples of 1 / (2H), so they do not drift. Taps outside the box are dropped and the others
renormalised; there is no antialiasing. Then come the jitter operations before contrast, and the float32 sum of each
tile and channel, from which color.py computes the mean.

A row of four taps is 12 bytes at any alignment. Four aligned 32-bit reads cover them, a third of the reads of single
bytes. Only words that hold a byte of the image are read, whatever the box is.
Moved: the bytes of the box once (both views of an image run side by side and share the cache), one write per element,
and 12 bytes of sums per tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels.color import contrast_position, jitter, unit
from fastbyol.kernels.view_params import BOX, COLUMNS, FLIP, JITTER, ViewParams

# A program makes STEPS * ROWS rows of COLS pixels, ROWS at a time, one pixel per thread and one row per warp, so that
# neighbouring threads read neighbouring bytes. Threads are numbered in one dimension: for a two-dimensional tile of
# scattered reads the compiler may form warps from columns (Triton 3.6 does).
STEPS, ROWS, COLS = 4, 8, 32
WARPS = 8
WORD = 4  # bytes


@triton.jit
def _taps(out, length, SIDE: tl.constexpr):
    """Return, for each output, the first of four taps, their weights (0 outside [0, length)) and the weights' sum."""
    position = (2 * out + 1) * length - SIDE
    base = (position + 2 * SIDE) // (2 * SIDE) - 1  # floor: position > -2 * SIDE, and Triton's // truncates
    t = (position - base * (2 * SIDE)).to(tl.float32) * (1 / (2 * SIDE))
    w0 = tl.where(base >= 1, ((1.0 - 0.5 * t) * t - 0.5) * t, 0.0)  # -1 <= base < length
    w1 = tl.where(base >= 0, (1.5 * t - 2.5) * t * t + 1.0, 0.0)
    w2 = tl.where(base < length - 1, ((2.0 - 1.5 * t) * t + 0.5) * t, 0.0)
    w3 = tl.where(base < length - 2, (0.5 * t - 0.5) * t * t, 0.0)
    return base - 1, (w0, w1, w2, w3), w0 + w1 + w2 + w3


@triton.jit
def _four_bytes(low, high, shift):
    """Return the four bytes that start `shift` bits into two consecutive words, as floats.

    A byte in the low bits of the mantissa of 2**23, or one byte higher in that of 2**15, gives that number plus the
    byte. So a bitwise operation and a subtraction convert it; a conversion instruction has an eighth of their rate.
    """
    word = (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> shift).to(tl.uint32)
    upper = word >> 16
    return (
        ((word & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0,
        ((word & 0xFF00) | 0x47000000).to(tl.float32, bitcast=True) - 32768.0,
        ((upper & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0,
        ((upper & 0xFF00) | 0x47000000).to(tl.float32, bitcast=True) - 32768.0,
    )


@triton.jit
def _row(words_ptr, words, start, weights):
    """Return the weighted sums of four RGB pixels from byte `start` on; the second or third lies in the image."""
    word = start >> 2
    shift = ((start & 3) * 8).to(tl.uint64)
    row_ptr = words_ptr + word
    a = tl.load(row_ptr, mask=word >= 0, other=0)
    b = tl.load(row_ptr + 1, mask=word >= -1, other=0)
    c = tl.load(row_ptr + 2, mask=word < words - 2, other=0)
    d = tl.load(row_ptr + 3, mask=word < words - 3, other=0)
    r0, g0, b0, r1 = _four_bytes(a, b, shift)
    g1, b1, r2, g2 = _four_bytes(b, c, shift)
    b2, r3, g3, b3 = _four_bytes(c, d, shift)
    w0, w1, w2, w3 = weights
    red = w0 * r0 + w1 * r1 + w2 * r2 + w3 * r3
    green = w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3
    blue = w0 * b0 + w1 * b1 + w2 * b2 + w3 * b3
    return red, green, blue


@triton.jit
def _window(words_ptr, words, phase, size, first, weights_y, weights_x):
    """Return the weighted sums of 4 x 4 pixels; size: the image's height and width, first: row and column."""
    height, width = size
    first_row, column = first
    r = tl.zeros(column.shape, tl.float32)
    g = tl.zeros(column.shape, tl.float32)
    b = tl.zeros(column.shape, tl.float32)
    for j in tl.static_range(4):
        row = tl.minimum(tl.maximum(first_row + j, 0), height - 1)  # the weight is 0 where this changes the row
        red, green, blue = _row(words_ptr, words, phase + (row * width + column) * 3, weights_x)
        r += weights_y[j] * red
        g += weights_y[j] * green
        b += weights_y[j] * blue
    return r, g, b


@triton.jit
def _side(size_ptr, params_ptr, AXIS: tl.constexpr):
    """Return an image's size and the box's start and length; an empty or outlying box is moved inside the image."""
    size = tl.load(size_ptr + AXIS).to(tl.int32)
    start = tl.load(params_ptr + BOX + AXIS).to(tl.int32)
    length = tl.load(params_ptr + BOX + 2 + AXIS).to(tl.int32)
    start = tl.minimum(tl.maximum(start, 0), size - 1)
    return size, start, tl.minimum(tl.maximum(length, 1), size - start)


@triton.jit(do_not_specialize=["views", "images"])
def crop_kernel(
    pixels_ptr,  # [bytes] uint8, at a multiple of WORD
    offsets_ptr,  # [B] int64
    sizes_ptr,  # [B, 2]
    params_ptr,  # [V, B, COLUMNS] float32
    planes_ptr,  # [V, B, 3, SIDE, SIDE]
    sums_ptr,  # [V, B, 3, tiles] float32
    views,
    images,
    SIDE: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    across: tl.constexpr = (SIDE + COLS - 1) // COLS
    tiles: tl.constexpr = (SIDE + STEPS * ROWS - 1) // (STEPS * ROWS) * across
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles // views).to(tl.int64)
    view = tl.program_id(0) // tiles % views
    view_image = view * images + image
    params_ptr += view_image * COLUMNS
    planes_ptr += view_image * (3 * SIDE * SIDE)

    height, top, box_height = _side(sizes_ptr + 2 * image, params_ptr, 0)
    width, left, box_width = _side(sizes_ptr + 2 * image, params_ptr, 1)
    offset = tl.load(offsets_ptr + image)
    words_ptr = pixels_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + (offset >> 2)
    phase = (offset & 3).to(tl.int32)
    words = (phase + height * width * 3 + 3) >> 2
    before_contrast = 0
    if tl.load(params_ptr + JITTER) > 0:
        before_contrast = contrast_position(params_ptr)

    thread = tl.arange(0, ROWS * COLS)
    x = tile % across * COLS + thread % COLS
    last = SIDE - 1
    source_x = tl.minimum(x, last)  # pixels beyond the output are computed but not written
    source_x = tl.where(tl.load(params_ptr + FLIP) > 0, last - source_x, source_x)
    first_x, weights_x, sum_x = _taps(source_x, box_width, SIDE)
    red_sum = tl.zeros([ROWS * COLS], tl.float32)
    green_sum = tl.zeros([ROWS * COLS], tl.float32)
    blue_sum = tl.zeros([ROWS * COLS], tl.float32)
    for step in range(STEPS):
        y = (tile // across * STEPS + step) * ROWS + thread // COLS
        first_y, weights_y, sum_y = _taps(tl.minimum(y, last), box_height, SIDE)
        first = (top + first_y, left + first_x)
        r, g, b = _window(words_ptr, words, phase, (height, width), first, weights_y, weights_x)
        scale = 1.0 / (255.0 * sum_y * sum_x)
        r, g, b = unit(r * scale), unit(g * scale), unit(b * scale)
        for position in range(before_contrast):
            r, g, b = jitter(r, g, b, params_ptr, position)

        inside = (y < SIDE) & (x < SIDE)
        red_ptr = planes_ptr + y * SIDE + x
        tl.store(red_ptr, r, mask=inside)
        tl.store(red_ptr + SIDE * SIDE, g, mask=inside)
        tl.store(red_ptr + 2 * SIDE * SIDE, b, mask=inside)
        red_sum += tl.where(inside, r, 0.0)
        green_sum += tl.where(inside, g, 0.0)
        blue_sum += tl.where(inside, b, 0.0)
    sums_ptr += view_image * (3 * tiles) + tile
    tl.store(sums_ptr, tl.sum(red_sum))
    tl.store(sums_ptr + tiles, tl.sum(green_sum))
    tl.store(sums_ptr + 2 * tiles, tl.sum(blue_sum))


def tiling(side: int) -> tuple[int, int]:
    """Return the number of steps per program and the number of tiles of an output of this side."""
    steps = min(STEPS, triton.cdiv(side, ROWS))
    return steps, triton.cdiv(side, steps * ROWS) * triton.cdiv(side, COLS)


def crop(pixels: Tensor, offsets: Tensor, sizes: Tensor, params: ViewParams, *, out: Tensor) -> Tensor:
    """Write the crops of V views to out [V*B, 3, H, H], contiguous; return sums [V*B, 3, T] float32 of T tiles each.

    pixels, offsets, sizes: as for reference.random_resized_crop, contiguous; an image has fewer than 2**31 bytes.
    """
    views, images, _ = params.packed.shape
    side = out.shape[2]
    if pixels.data_ptr() % WORD:
        pixels = pixels.clone()
    steps, tiles = tiling(side)
    sums = params.packed.new_empty(views * images, 3, tiles)
    crop_kernel[(views * images * tiles,)](
        pixels,
        offsets,
        sizes,
        params.packed,
        out,
        sums,
        views,
        images,
        SIDE=side,
        STEPS=steps,
        ROWS=ROWS,
        COLS=COLS,
        num_warps=WARPS,
    )
    return sums
