"""The stem's convolution, 7x7 with stride 2 and padding 3, as one with stride 1 and more channels.

cuDNN pads three input channels to eight and falls back to slow code: with its weight's gradient that took 12 ms on an
H100 for 1024 images of 224 px, of the 201 ms of a ResNet-50's step. Instead each square of 2x2 pixels becomes one pixel
with 4 C channels. With the weight padded by a row above and a column to the left, and k = 2 a + b,

    sum over k < 8 of weight[k] x[2 i + k - 4]  =  sum over a < 4 and b < 2 of weight[2 a + b] square[i + a - 2][b]

so 4x4 squares give the same result, but for the order of summation. With SPAN squares side by side in the channels,
there are 4/SPAN taps across. Channels are padded to a power of two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels.dispatch import runs_triton

LEAST_CHANNELS = 8  # 128 bits in bfloat16
MARGIN = tl.constexpr(2)  # squares of zeros above and to the left; below and to the right there is one
SPAN = 4  # squares beside one another in the channels: 1 or 4
WARPS = 4
TILE = 2048  # elements per program: 16 per thread


@triton.jit
def fold_kernel(
    images_ptr,  # [N, height, width, CHANNELS]
    folded_ptr,  # [N, rows, columns, FOLDED]
    height,
    width,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    FOLDED: tl.constexpr,
    BM: tl.constexpr,
):
    """Write a row of squares, zeros where they lie outside; grid (N * rows, tiles of a row)."""
    line = tl.program_id(0)
    image, y = (line // rows).to(tl.int64), line % rows
    x = tl.program_id(1) * BM + tl.arange(0, BM)
    c = tl.arange(0, FOLDED)
    lower, beside = c // (2 * SPAN * CHANNELS), c % (2 * SPAN * CHANNELS)  # which row of the squares, and where in it
    h = 2 * (y - MARGIN) + lower
    left = 2 * (x - MARGIN)
    w = left[:, None] + (beside // CHANNELS)[None, :]
    inside = ((c < 4 * SPAN * CHANNELS) & (h >= 0) & (h < height))[None, :] & (w >= 0) & (w < width)
    at = (image * height + h)[None, :] * (width * CHANNELS) + (left * CHANNELS)[:, None] + beside[None, :]
    values = tl.load(images_ptr + at, mask=inside, other=0.0)
    to = (line.to(tl.int64) * columns + x)[:, None] * FOLDED + c[None, :]
    tl.store(folded_ptr + to, values.to(folded_ptr.dtype.element_ty), mask=(x < columns)[:, None])


def fold(images: Tensor, *, dtype: torch.dtype, span: int = SPAN) -> Tensor:
    """Fold images [N, C, H, W] into squares [N, 4 span C and zeros, ceil(H / 2) + 3, ceil(W / 2) + 4 - span]."""
    count, channels, height, width = images.shape
    images = images.contiguous(memory_format=torch.channels_last)
    rows, columns = (height + 1) // 2 + 3, (width + 1) // 2 + 4 - span
    padded = max(int(triton.next_power_of_2(4 * span * channels)), LEAST_CHANNELS)
    folded = torch.empty(
        (count, padded, rows, columns), dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    tile = min(int(triton.next_power_of_2(columns)), TILE // padded)
    fold_kernel[(count * rows, triton.cdiv(columns, tile))](
        images,
        folded,
        height,
        width,
        rows,
        columns,
        CHANNELS=channels,
        SPAN=span,
        FOLDED=padded,
        BM=tile,
        num_warps=WARPS,
    )
    return folded


def fold_weight(weight: Tensor, *, channels: int, span: int = SPAN) -> Tensor:
    """Fold a weight [P, C, 7, 7] into one [P, channels, 4, 4 / span] for folded images of so many channels."""
    squares = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4 // span, 2 * span)).unflatten(2, (4, 2))
    folded = squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # from [P, C, a, b, a', b'], b' across the span
    return F.pad(folded, (0, 0, 0, 0, 0, channels - folded.shape[1])).contiguous()


def stem_convolution(images: Tensor, weight: Tensor, *, span: int = SPAN) -> Tensor:
    """Convolve images [N, C, H, W] with weight [P, C, 7, 7] at stride 2 and padding 3: [N, P, ceil(H/2), ceil(W/2)].

    The same as torch's conv2d, rounding apart; for images that need a gradient, and where the Triton kernels do not
    run, it is conv2d.
    """
    if not runs_triton(images) or (images.requires_grad and torch.is_grad_enabled()):
        return F.conv2d(images, weight, stride=2, padding=3)
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    folded = fold(images, dtype=dtype, span=span)
    return F.conv2d(folded, fold_weight(weight, channels=folded.shape[1], span=span))
