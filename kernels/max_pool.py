"""Max pooling of a ResNet's stem, 3x3 with stride 2 and padding 1, with two consumers of the result.

x is [N, C, H, W] in channels-last memory, z [N, C, OH, OW] with OH = (H - 1) // 2 + 1:

    forward   z = the largest of a window; place = its position in the window, 0 to 8, row by row, one byte
    backward  dx = the sum, over the windows whose largest is this element, of both consumers' gradients

The backward gathers, so it needs no atomics and gives the same bits every time. torch keeps x and one int64 index per
element of z for its backward; here one byte per element of z is kept, and x can be freed.

Elements moved, with z a quarter of x: forward reads x and writes z and a byte; backward reads one or two dz and the
byte, and writes dx. Neighbouring windows overlap by a third; those reads are left to the caches. Backward, four windows
are read for a square of four elements: one element at a time would read nine, which took 2.3 ms on an H100 for 1024
images, 2.6 times what its bytes need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm import channels_last
from fastbyol.kernels.batchnorm_statistics import column_block
from fastbyol.kernels.dispatch import runs_triton

_ORDER = torch.channels_last
TILE = 1024  # elements of z per program: 8 per thread, one 128-bit access in bfloat16; at twice that Triton 3.6 spills
WARPS = 4


@triton.jit
def max_pool_kernel(
    x_ptr,
    z_ptr,
    place_ptr,
    height,
    width,
    out_height,
    out_width,
    channels,
    pixels,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write z and, if given, the places; grid (tiles of the N*OH*OW pixels of z, columns)."""
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row = p // out_width
    left, image = 2 * (p % out_width) - 1, row // out_height
    top = 2 * (row % out_height) - 1
    largest = tl.full([BM, BC], float("-inf"), tl.float32)
    first = tl.where(top < 0, 3, 0) + tl.where(left < 0, 1, 0)  # place of the first element inside the image
    place = tl.zeros([BM, BC], tl.int32) + first[:, None]
    for k in tl.static_range(9):
        h, w = top + k // 3, left + k % 3
        inside = (p < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = ((image * height + h) * width + w)[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + at, mask=inside[:, None] & (c < channels)[None, :], other=float("-inf")).to(tl.float32)
        is_larger = (x > largest) | (x != x)  # noqa: PLR0124  # NaN wins, as in torch
        largest = tl.where(is_larger, x, largest)
        place = tl.where(is_larger, k, place)
    at, mask = p[:, None] * channels + c[None, :], (p < pixels)[:, None] & (c < channels)[None, :]
    tl.store(z_ptr + at, largest.to(z_ptr.dtype.element_ty), mask=mask)
    if place_ptr is not None:
        tl.store(place_ptr + at, place.to(tl.uint8), mask=mask)


@triton.jit
def _load_window(dz_ptr, other_dz_ptr, place_ptr, line, row, column, out_height, out_width, c, inside, channels):
    """Return places and summed gradients of the windows at (row, column) of z's lines; 255 and 0 outside the image."""
    mask = (inside & (row < out_height) & (column < out_width))[:, None] & (c < channels)[None, :]
    at = (line * out_width + column)[:, None] * channels + c[None, :]
    place = tl.load(place_ptr + at, mask=mask, other=255).to(tl.int32)
    g = tl.load(dz_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if other_dz_ptr is not None:
        g += tl.load(other_dz_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return place, g


@triton.jit
def square_gradients(dz_ptr, other_dz_ptr, place_ptr, image, i, j, out_height, out_width, c, inside, channels):
    """Return the gradients of the four elements of x from (2 i, 2 j) on, row by row; 0 outside the image.

    Window (i, j) holds all four, (i, j + 1) the two on the right, (i + 1, j) the lower two, (i + 1, j + 1) the last.
    image is int64.
    """
    line = image * out_height + i
    place, g = _load_window(dz_ptr, other_dz_ptr, place_ptr, line, i, j, out_height, out_width, c, inside, channels)
    upper_left = tl.where(place == 4, g, 0.0)
    upper_right = tl.where(place == 5, g, 0.0)
    lower_left = tl.where(place == 7, g, 0.0)
    lower_right = tl.where(place == 8, g, 0.0)
    place, g = _load_window(dz_ptr, other_dz_ptr, place_ptr, line, i, j + 1, out_height, out_width, c, inside, channels)
    upper_right += tl.where(place == 3, g, 0.0)
    lower_right += tl.where(place == 6, g, 0.0)
    line += 1
    place, g = _load_window(dz_ptr, other_dz_ptr, place_ptr, line, i + 1, j, out_height, out_width, c, inside, channels)
    lower_left += tl.where(place == 1, g, 0.0)
    lower_right += tl.where(place == 2, g, 0.0)
    place, g = _load_window(
        dz_ptr, other_dz_ptr, place_ptr, line, i + 1, j + 1, out_height, out_width, c, inside, channels
    )
    lower_right += tl.where(place == 0, g, 0.0)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit
def square_offsets(image, i, j, height, width, channels, c, inside):
    """Return the offsets of the elements (2 i, 2 j) of x, and masks of those, of the column and row beside them.

    image is int64. The other elements lie channels, width * channels, and both farther.
    """
    at = ((image * height + 2 * i) * width + 2 * j)[:, None] * channels + c[None, :]
    exists = inside[:, None] & (c < channels)[None, :]
    return at, exists, exists & (2 * j + 1 < width)[:, None], exists & (2 * i + 1 < height)[:, None]


@triton.jit
def max_pool_backward_kernel(
    dz_ptr,
    other_dz_ptr,
    place_ptr,
    dx_ptr,
    height,
    width,
    out_height,
    out_width,
    channels,
    pixels,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write dx in squares of 2x2, one for each pixel of z; grid (tiles of the N*OH*OW pixels of z, columns)."""
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside, line, j = p < pixels, p // out_width, p % out_width
    image, i = line // out_height, line % out_height
    upper_left, upper_right, lower_left, lower_right = square_gradients(
        dz_ptr, other_dz_ptr, place_ptr, image, i, j, out_height, out_width, c, inside, channels
    )
    at, exists, has_right, has_lower = square_offsets(image, i, j, height, width, channels, c, inside)
    below = at + width * channels
    dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + at, upper_left.to(dtype), mask=exists)
    tl.store(dx_ptr + at + channels, upper_right.to(dtype), mask=has_right)
    tl.store(dx_ptr + below, lower_left.to(dtype), mask=has_lower)
    tl.store(dx_ptr + below + channels, lower_right.to(dtype), mask=has_lower & has_right)


def _launch(pixels: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    bc = column_block(channels)
    bm = TILE // bc
    return (triton.cdiv(pixels, bm), triton.cdiv(channels, bc)), {"BM": bm, "BC": bc}


def out_side(side: int) -> int:
    """Return the height or width of the result for that of x."""
    return (side - 1) // 2 + 1


def _sides(x: Tensor, z_sides: Sequence[int]) -> dict[str, int]:
    names = ("height", "width", "out_height", "out_width", "channels")
    return dict(zip(names, (*x.shape[2:], *z_sides, x.shape[1]), strict=True))


class _MaxPool(torch.autograd.Function):
    """Max pooling that returns its result twice; differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keeps_places: bool) -> tuple[Tensor, Tensor]:
        images, channels, *sides = x.shape
        out_sides = [out_side(side) for side in sides]
        z = torch.empty((images, channels, *out_sides), dtype=x.dtype, device=x.device, memory_format=_ORDER)
        pixels = z.numel() // channels
        places = x.new_empty((pixels, channels), dtype=torch.uint8) if keeps_places else None
        grid, tile = _launch(pixels, channels)
        max_pool_kernel[grid](x, z, places, **_sides(x, out_sides), pixels=pixels, **tile, num_warps=WARPS)
        ctx.save_for_backward(places)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)  # an unused result has no gradient, and none is read
        return z, z.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        dz, other = (*(channels_last(g) for g in grads if g is not None), None)[:2]
        assert dz is not None, "autograd asks for a backward only where a gradient arrives"
        dx = torch.empty(ctx.shape, dtype=ctx.dtype, device=dz.device, memory_format=_ORDER)
        pixels = dz.numel() // dx.shape[1]
        grid, tile = _launch(pixels, dx.shape[1])
        max_pool_backward_kernel[grid](
            dz, other, places, dx, **_sides(dx, dz.shape[2:]), pixels=pixels, **tile, num_warps=WARPS
        )
        return dx, None


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 3x3 max pooling of x at stride 2 twice, once for each consumer; see reference.max_pool.

    Both share memory. Either gradient may be missing; two are added inside the backward kernel.
    """
    if not runs_triton(x):
        return reference.max_pool(x)
    twins: tuple[Tensor, Tensor] = _MaxPool.apply(channels_last(x), torch.is_grad_enabled() and x.requires_grad)
    return twins
