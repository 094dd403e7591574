"""Random crops, colour jitter, grayscale, blur, solarization and normalisation in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.kernels.view_params import ViewParams

KEYS_CUBIC = (  # Keys 1981, a = -1/2: columns are the pixels at -1, 0, 1, 2; rows are powers of the fraction
    (0.0, 1.0, 0.0, 0.0),
    (-0.5, 0.0, 0.5, 0.0),
    (1.0, -2.5, 2.0, -0.5),
    (-0.5, 1.5, -1.5, 0.5),
)
LUMA = (0.2989, 0.5870, 0.1140)  # ITU-R BT.601, as tf.image.rgb_to_grayscale rounds it
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHUNK_PIXELS = 2**19  # of source or of views at a time: limits temporaries to a few times 6 MB


def unpack_planes(pixels: Tensor, offsets: Tensor, sizes: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Unpack images to one tensor [B, H, 3, W] of the largest height and width, with values 0..255.

    pixels: [bytes] uint8; offsets: [B] int64; sizes: [B, 2] (H, W). Values to the right of and below an image are
    arbitrary but finite. If widths differ, 3 * W spare bytes after the last image save a copy of the buffer.
    """
    max_height, max_width = (int(side) for side in sizes.amax(0))  # syncs
    heights, widths = sizes.long()[..., None].unbind(1)
    row = torch.arange(max_height, device=pixels.device)
    starts = offsets[:, None] + torch.minimum(row, heights - 1) * widths * 3
    span = max_width * 3
    overrun = int(starts.max()) + span - pixels.numel()
    if overrun > 0:  # the last image is narrower than the widest
        pixels = F.pad(pixels, (0, overrun))
    every_span = pixels.as_strided((pixels.numel() - span + 1, span), (1, 1))
    rows = every_span.index_select(0, starts.flatten())
    return rows.view(-1, max_height, max_width, 3).transpose(2, 3).to(dtype, memory_format=torch.contiguous_format)


def bicubic_weights(
    starts: Tensor, lengths: Tensor, flip: Tensor, *, padded: int, out_px: int, dtype: torch.dtype
) -> Tensor:
    """Return weights [N, out_px, padded] that resample pixels [start, start + length) to out_px, reversed if `flip`.

    starts, lengths: [N] integer, start + length <= padded; flip: [N] bool. Output pixel i reads the four pixels around
    (i + 1/2) * length / out_px - 1/2; those outside the window are dropped and the weights of the others renormalised.
    """
    out = torch.arange(out_px, device=starts.device)
    out = torch.where(flip[:, None], out_px - 1 - out, out)
    lengths = lengths.long()[:, None]
    position = (2 * out + 1) * lengths - out_px  # in units of 1 / (2 * out_px) pixels, so that the division is exact
    base = torch.div(position, 2 * out_px, rounding_mode="floor")
    fraction = (position - base * (2 * out_px)).to(dtype).div_(2 * out_px)
    powers = torch.stack((torch.ones_like(fraction), fraction, fraction**2, fraction**3), -1)
    taps = base[..., None] + torch.arange(-1, 3, device=starts.device)
    is_inside = (taps >= 0) & (taps < lengths[..., None])
    weights = (powers @ torch.tensor(KEYS_CUBIC, dtype=dtype, device=starts.device)).mul_(is_inside)
    weights = weights.div_(weights.sum(-1, keepdim=True))
    taps = (taps + starts.long()[:, None, None]).clamp_(0, padded - 1)  # a dropped tap adds zero at any position
    return torch.zeros(*base.shape, padded, dtype=dtype, device=starts.device).scatter_add_(2, taps, weights)


def random_resized_crop(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flip: Tensor, *, crop_px: int, dtype: torch.dtype
) -> Tensor:
    """Resample V boxes of each packed image to crop_px squares, flip them where drawn, clip to [0, 1].

    pixels: [bytes] uint8, RGB images H W C; offsets: [B] int64, each image's first byte; sizes: [B, 2] (H, W);
    boxes: [V, B, 4] (top, left, height, width) in whole pixels inside the image; flip: [V, B] bool.
    Result: [V*B, 3, crop_px, crop_px], view-major.
    """
    planes = unpack_planes(pixels, offsets, sizes, dtype=dtype)
    images, padded_height, _, padded_width = planes.shape
    out = torch.empty(len(boxes), images, 3, crop_px, crop_px, dtype=dtype, device=pixels.device)
    for view, mirrored, x in zip(boxes, flip, out, strict=True):
        top, left, height, width = view.unbind(1)
        down = bicubic_weights(
            top, height, torch.zeros_like(mirrored), padded=padded_height, out_px=crop_px, dtype=dtype
        )
        across = bicubic_weights(left, width, mirrored, padded=padded_width, out_px=crop_px, dtype=dtype)
        rows = torch.bmm(down.div_(255), planes.flatten(2)).view(images, crop_px * 3, padded_width)
        resampled = torch.bmm(rows, across.transpose(1, 2)).view(images, crop_px, 3, crop_px)
        torch.clamp(resampled.transpose(1, 2), 0, 1, out=x)
    return out.flatten(0, 1)


def brightness(x: Tensor, delta: Tensor) -> Tensor:
    """Add delta [N] and clip to [0, 1]."""
    return (x + delta[:, None, None, None]).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale by factor [N] about the mean of each channel of each image and clip to [0, 1]."""
    factor = factor[:, None, None, None]
    return (x * factor).add_(x.mean((2, 3), keepdim=True) * (1 - factor)).clamp_(0, 1)


def value_and_chroma(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the HSV value (largest channel) and the chroma (largest minus smallest), [N, H, W] each."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    return value, value - torch.minimum(torch.minimum(r, g), b)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply HSV saturation s = chroma / value by factor [N] >= 0, up to 1, at fixed hue and value.

    A channel at distance d below the value moves to d * s' / s, and s' / s = min(factor, value / chroma).
    """
    value, chroma = value_and_chroma(x)
    gain = torch.minimum(value / chroma.clamp_min_(torch.finfo(x.dtype).tiny), factor[:, None, None])
    value = value[:, None]
    return (x - value).mul_(gain[:, None]).add_(value).clamp_(0, 1)


def hue(x: Tensor, delta: Tensor) -> Tensor:
    """Rotate HSV hue by delta [N] full circles, at fixed saturation and value.

    On a circle of circumference 6 with red, green, blue at 0, 2, 4, a hue lies 1 + (g + b - r - min) / chroma from red,
    on green's side where g >= b; a channel is value - chroma * clip(distance from its primary - 1, 0, 1).
    """
    r, g, b = x.unbind(1)
    value, chroma = value_and_chroma(x)
    from_red = (g + b).sub_(r).sub_(value).add_(chroma).div_(chroma.clamp_min(torch.finfo(x.dtype).tiny)).add_(1)
    position = torch.copysign(from_red, g - b).add_(6 * delta[:, None, None])
    primary = torch.tensor([0, 2, 4], dtype=x.dtype, device=x.device)[:, None, None]
    distance = position[:, None] - primary
    distance.sub_(torch.round(distance / 6), alpha=6).abs_()
    absence = distance.clamp_(1, 2).sub_(1)
    return torch.sub(value[:, None], absence.mul_(chroma[:, None]))


JITTER = (brightness, contrast, saturation, hue)


def color_jitter(x: Tensor, factors: Tensor, order: Tensor, drawn: Tensor) -> Tensor:
    """Apply the four operations of JITTER to the drawn images, each image in its own order.

    factors: [N, 4], the operations' second arguments; order: [N, 4], the operation at each position, a permutation of
    0..3.
    """
    x = x.clone()
    for position in range(4):
        for k, operation in enumerate(JITTER):
            rows = (drawn & (order[:, position] == k)).nonzero().squeeze(1)
            x.index_copy_(0, rows, operation(x.index_select(0, rows), factors[rows, k]))
    return x


def grayscale(x: Tensor, drawn: Tensor) -> Tensor:
    """Set all three channels of the drawn images to their luma."""
    rows = drawn.nonzero().squeeze(1)
    r, g, b = x.index_select(0, rows).unbind(1)
    luma = (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])
    return x.index_copy(0, rows, luma[:, None].expand(-1, 3, -1, -1))


def gaussian_matrix(sigma: Tensor, *, side: int) -> Tensor:
    """Return the banded symmetric matrices [N, side, side] of a Gaussian of sigma [N] > 0 pixels.

    The kernel has 2 * int(side / 20) + 1 taps that sum to 1 before the border cuts them (zero padding).
    """
    radius = side // 20
    reach = torch.arange(radius + 1, dtype=torch.float64, device=sigma.device)
    taps = torch.exp(reach**2 / (-2 * sigma.double()[:, None] ** 2))
    taps = F.threshold(taps, 1e-20, 0)  # far below rounding; denormal products are many times slower
    taps = taps / (2 * taps.sum(1, keepdim=True) - 1)
    i = torch.arange(side, device=sigma.device)
    distance = (i[:, None] - i).abs_().clamp_(max=radius + 1)
    return F.pad(taps, (0, 1)).to(sigma.dtype).index_select(1, distance.flatten()).view(-1, side, side)


def gaussian_blur(x: Tensor, sigma: Tensor, drawn: Tensor) -> Tensor:
    """Blur the drawn square images with a separable Gaussian of sigma [N] pixels and zero padding."""
    rows = drawn.nonzero().squeeze(1)
    side = x.shape[2]
    chosen = x.index_select(0, rows)
    blur = gaussian_matrix(sigma[rows].to(x.dtype), side=side)
    across = torch.bmm(chosen.view(-1, 3 * side, side), blur).view(-1, 3, side, side)
    blurred = torch.matmul(blur[:, None], across)
    return x.index_copy(0, rows, blurred.clamp_(0, 1))


def solarize(x: Tensor, drawn: Tensor) -> Tensor:
    """Replace x by 1 - x where x >= 1/2, in the drawn images; on [0, 1] this is min(x, 1 - x)."""
    rows = drawn.nonzero().squeeze(1)
    chosen = x.index_select(0, rows)
    return x.index_copy(0, rows, torch.minimum(chosen, 1 - chosen))


def normalize(x: Tensor, *, out: Tensor) -> Tensor:
    """Write (x - mean) / std of ImageNet to `out`, of any strides and floating dtype; x and out: [..., 3, H, W]."""
    std = torch.tensor(IMAGENET_STD, dtype=x.dtype, device=x.device)[:, None, None]
    mean = torch.tensor(IMAGENET_MEAN, dtype=x.dtype, device=x.device)[:, None, None]
    return torch.addcmul(-mean / std, x, 1 / std, out=out)


def augment(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    params: ViewParams,
    *,
    crop_px: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Make V views of B images as kernels.augment.augment does, computed in float32 at least."""
    views, images, _ = params.packed.shape
    out = views_out(out, count=views * images, crop_px=crop_px, dtype=dtype, device=pixels.device)
    by_view = out.unflatten(0, (views, images))
    wide = torch.promote_types(dtype, torch.float32)
    for part in chunks(sizes, pixels_per_image=views * crop_px**2):
        p = ViewParams(params.packed[:, part])
        x = random_resized_crop(pixels, offsets[part], sizes[part], p.boxes, p.flip, crop_px=crop_px, dtype=wide)
        x = color_jitter(x, p.factors.flatten(0, 1).to(wide), p.order.flatten(0, 1), p.jitter.flatten())
        x = grayscale(x, p.grayscale.flatten())
        x = gaussian_blur(x, p.sigma.flatten().to(wide), p.blur.flatten())
        x = solarize(x, p.solarize.flatten())
        normalize(x.unflatten(0, (views, -1)), out=by_view[:, part])
    return out


def views_out(out: Tensor | None, *, count: int, crop_px: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `out`, or a new tensor [count, 3, crop_px, crop_px] channels_last.

    Raises ValueError if `out` is not such a tensor.
    """
    shape = (count, 3, crop_px, crop_px)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    is_channels_last = out.is_contiguous(memory_format=torch.channels_last)
    if (out.shape, out.dtype, out.device, is_channels_last) != (shape, dtype, device, True):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} of strides {out.stride()} on {out.device}; "
            f"views need {dtype} {list(shape)} channels_last on {device}"
        )
    return out


def chunks(sizes: Tensor, *, pixels_per_image: int) -> Iterator[slice]:
    """Split B images into slices whose padded sources and views stay below CHUNK_PIXELS, at least one image each."""
    if not len(sizes):
        return
    source_pixels = int(sizes.amax(0).long().prod())  # syncs
    step = max(1, CHUNK_PIXELS // max(source_pixels, pixels_per_image))
    for start in range(0, len(sizes), step):
        yield slice(start, start + step)
