"""Reference implementations of every operation except convolutions, in plain torch, for any device and float dtype.

The first part is the views: images are x [N, 3, H, W] in [0, 1], and every operation but `normalize` keeps that range.
If an operation takes `drawn` [N] bool, it leaves the other images unchanged. The second part is the step: batch norm
per view, loss, LARS and the EMA target. Only `out`, running statistics and arguments of functions whose name ends in
`_` are written to. Source: paper, appendix B; TensorFlow 2's bicubic resizing, adjust_contrast, adjust_saturation,
adjust_hue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
NORM_EPS = 1e-12  # under the root of a squared norm (the authors' code)


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
    """Make V views of B images: crop, flip, jitter, grayscale, blur, solarize, normalise.

    pixels, offsets, sizes: as for random_resized_crop. Result: [V*B, 3, crop_px, crop_px] channels_last, view-major,
    computed in float32 at least, in `out` if given.
    """
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


def check_channels(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless x is [N, C] or [N, C, H, W] with the C channels of weight [C]."""
    if x.ndim not in (2, 4) or x.shape[1] != len(weight):
        raise ValueError(f"batch norm of C = {len(weight)} channels got {list(x.shape)}; give [N, C] or [N, C, H, W]")


def check_views(x: Tensor, weight: Tensor, *, views: int, is_alone: bool) -> None:
    """Raise ValueError unless x splits into views and each channel has at least 2 values, as a variance needs.

    is_alone: no other rank contributes values.
    """
    check_channels(x, weight)
    if x.shape[0] % views:
        raise ValueError(
            f"batch norm got {x.shape[0]} rows for {views} views; give views of equal size, one after the other"
        )
    if is_alone and x.numel() // (x.shape[1] * views) < 2:
        raise ValueError(f"batch norm got {list(x.shape)} for {views} views, one value per channel; give more images")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise ValueError unless the residual has the shape of x."""
    if residual.shape != x.shape:
        raise ValueError(f"batch norm got a residual {list(residual.shape)} for x {list(x.shape)}; give equal shapes")


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks of a group; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None


def _synchronized_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    views: int,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Normalise x with statistics of d = x - running mean over a group; one all-reduce of [V, 2C+1] sums each way."""
    wide = torch.promote_types(x.dtype, torch.float32)
    per_channel = (1, 1, -1, *[1] * (x.ndim - 2))
    d = x.unflatten(0, (views, -1)).to(wide) - running_mean.view(per_channel)  # [V, B, C, ...]
    across = [i for i in range(d.ndim) if i not in (0, 2)]
    local_count = d.new_full((views, 1), d[0].numel() // len(weight))
    sums = torch.cat((d.sum(across), d.square().sum(across), local_count), 1)
    joined: Tensor = _SumOverRanks.apply(sums, group)
    total, square, count = joined.split((len(weight), len(weight), 1), 1)
    offset = total / count
    variance = (square / count - offset.square()).clamp_min(0)
    with torch.no_grad():
        for mean, unbiased in zip(running_mean + offset, variance * (count / (count - 1)), strict=True):
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    per_view = (views, 1, -1, *[1] * (x.ndim - 2))
    xhat = (d - offset.view(per_view)) * torch.rsqrt(variance + eps).view(per_view)
    return torch.addcmul(bias.view(per_channel), xhat, weight.view(per_channel)).flatten(0, 1).to(x.dtype)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    *,
    relu: bool,
    views: int,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Normalise x with the batch statistics of each view, like `views` separate forwards, then apply ReLU if `relu`.

    x is [V*B, C] or [V*B, C, H, W], view-major; weight, bias [C]. running_mean and running_var [C] are updated in
    place, view after view, with the unbiased variance; a channel where either would become inf or NaN keeps both.
    num_batches_tracked, int64, grows by `views`. With a group, a view's statistics are over all ranks, whose running
    statistics must be equal and whose B may differ; gradients of weight and bias are those of the own rank. Raises
    ValueError if the first dimension does not split into `views`, or if a channel has one value per view.
    """
    check_views(x, weight, views=views, is_alone=group is None)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(views)
    mean, var = running_mean.clone(), running_var.clone()
    if group is not None:
        y = _synchronized_batch_norm(x, weight, bias, mean, var, views=views, momentum=momentum, eps=eps, group=group)
    else:
        y = torch.cat([F.batch_norm(part, mean, var, weight, bias, True, momentum, eps) for part in x.chunk(views)])
    with torch.no_grad():
        is_finite = mean.isfinite() & var.isfinite()
        running_mean.copy_(torch.where(is_finite, mean, running_mean))
        running_var.copy_(torch.where(is_finite, var, running_var))
    return y.relu_() if relu else y


def batch_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    *,
    views: int,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute relu(batch norm of x + residual) and return it twice, once for each of two consumers.

    The residual has the shape of x; everything else is as in batch_norm_act.
    """
    check_residual(x, residual)
    y = batch_norm_act(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        relu=False,
        views=views,
        momentum=momentum,
        eps=eps,
        group=group,
    )
    z = y.add_(residual).relu_()
    return z, z


def batch_norm_eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    relu: bool,
    eps: float,
) -> Tensor:
    """Normalise x with the running statistics, add the residual if given, then apply ReLU if `relu`."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pool x [N, C, H, W] by 3x3 windows, stride 2, padding 1; return [N, C, OH, OW] twice, for two consumers."""
    z = F.max_pool2d(x, 3, 2, 1)
    return z, z


def normalize_rows(x: Tensor) -> Tensor:
    """Scale rows [N, D] to unit length: x * rsqrt(max(sum(x^2), 1e-12)); a zero row stays zero."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(NORM_EPS).rsqrt()


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Compute BYOL's loss, the sum of both directions averaged over images, in [0, 8].

    q, z [2B, D]: online predictions and target projections, view-major; each row of q is compared with the row of z
    of the same image's other view. Computed in float32 at least. Source: paper, eq. 2; the authors' code for
    eps.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    other = torch.cat(z.detach().chunk(2)[::-1])
    difference = normalize_rows(q.to(wide)) - normalize_rows(other.to(wide))
    return difference.square().sum() / (q.shape[0] // 2)


class LarsRates(NamedTuple):
    """Settings of one group; a trust of None sets the ratio to 1, and tau is the EMA rate of its targets."""

    lr: float
    momentum: float
    weight_decay: float
    trust: float | None
    tau: float


class LarsGroup(NamedTuple):
    """Tensors with the same settings: parameters with their gradients, momenta and targets, None for no target."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momenta: Sequence[Tensor]
    targets: Sequence[Tensor | None]
    rates: LarsRates


def lars_ema_(groups: Sequence[LarsGroup], *, skipped: Tensor) -> None:
    """Take one LARS step and update the targets, or skip both if the norm of any gradient is inf or NaN.

    g <- g + wd*p;  ratio = trust*|p|/|g|, 1 where either norm is 0 or trust is None (biases and batch norm);
    u <- momentum*u + ratio*g;  p <- p - lr*u;  target <- tau*target + (1-tau)*p.
    skipped: [2] int32, counts the skipped steps, in total and in a row. Source: the authors' code; the skip is ours.
    """
    decayed = [torch._foreach_add(list(g.grads), list(g.params), alpha=g.rates.weight_decay) for g in groups]
    norms = [torch.stack(torch._foreach_norm(gradients)) for gradients in decayed]
    if not torch.cat(norms).isfinite().all():  # syncs
        skipped += 1
        return
    skipped[1] = 0
    for group, gradients, g_norms in zip(groups, decayed, norms, strict=True):
        lr, momentum, _, trust, tau = group.rates
        if trust is not None:
            p_norms = torch.stack(torch._foreach_norm(list(group.params)))
            ratios = torch.where((p_norms > 0) & (g_norms > 0), trust * p_norms / g_norms, 1.0)
            torch._foreach_mul_(gradients, list(ratios.unbind()))
        torch._foreach_mul_(list(group.momenta), momentum)
        torch._foreach_add_(list(group.momenta), gradients)
        torch._foreach_add_(list(group.params), list(group.momenta), alpha=-lr)
        pairs = [(target, p) for target, p in zip(group.targets, group.params, strict=True) if target is not None]
        if pairs:
            targets, followed = zip(*pairs, strict=True)
            ema_(targets, followed, tau=tau)


def ema_(targets: Sequence[Tensor], params: Sequence[Tensor], *, tau: float | Tensor) -> None:
    """Move targets towards params in place: xi <- tau*xi + (1-tau)*theta; tau in [0, 1], where 1 freezes and 0 copies.

    tau may be a scalar tensor on the targets' device, of float32 or, for an exact 1-tau, float64.
    """
    if isinstance(tau, Tensor):
        follow = (1 - tau).to(targets[0].dtype)
        torch._foreach_lerp_(list(targets), list(params), [follow] * len(targets))
    else:
        torch._foreach_lerp_(list(targets), list(params), 1 - tau)


def ema_loss(
    q: Tensor, z: Tensor, targets: Sequence[Tensor], params: Sequence[Tensor], *, tau: float | Tensor
) -> Tensor:
    """Compute byol_loss of q and z [2B, D] and move the targets, from which z was computed, towards params.

    The params are still those of this step, so the target is one step behind that of `lars_ema_`.
    """
    with torch.no_grad():
        ema_(targets, params, tau=tau)
    return byol_loss(q, z)
