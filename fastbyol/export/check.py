"""The check of what a loaded encoder is given: images of another form end in one line that says what to give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD


def check_images(images: Tensor, weight: Tensor, channels: int = 3) -> None:
    """Raise ConfigError unless images are [N, 3, H, W], of the weight's dtype or under autocast, on its device.

    Gray images [N, 1, H, W] are taken by an encoder of 1 channel, too.

    It reads no values, so a GPU does not wait. While torch.jit traces nothing is checked: sizes are tensors there.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch's stubs do not export it
        return
    if not isinstance(images, Tensor):
        raise ConfigError(
            f"images are a {type(images).__name__}; wanted a {weight.dtype} tensor [N, 3, H, W]; for numpy's arrays "
            "give torch.from_numpy(images)"
        )
    is_batch = images.ndim == 4 and images.shape[1] in (3, channels)
    if not (is_batch and _has_dtype(images, weight) and _is_beside(images, weight)):
        raise ConfigError(
            f"images are {images.dtype} {list(images.shape)} on {images.device}; wanted {weight.dtype} [N, 3, H, W] on "
            f"{weight.device}; {_remedy(images, weight)}"
        )


def check_call(encoder: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Check what an encoder is called with, before its forward, which is not ours."""
    config = getattr(encoder, "config", None)
    channels = config.channels if isinstance(config, EncoderConfig) else 3
    for images, weight in zip(given[:1], encoder.parameters(), strict=False):
        check_images(images, weight, channels)


def _has_dtype(images: Tensor, weight: Tensor) -> bool:
    if images.dtype == weight.dtype:
        return True
    return images.is_floating_point() and torch.is_autocast_enabled(images.device.type)


def _is_beside(images: Tensor, weight: Tensor) -> bool:
    return images.device == weight.device or weight.is_meta  # what offloads weights brings them for each layer alone


def _remedy(images: Tensor, weight: Tensor) -> str:
    """Say what to give instead: an expression of the images, and what it cannot know."""
    change = _change_of_layout(list(images.shape))
    if change is None:
        return "give a batch of RGB images"
    if not _is_beside(images, weight):
        change += f".to({str(weight.device)!r})"
    if images.is_floating_point():
        return f"give images{change}" + ("" if _has_dtype(images, weight) else f".to({weight.dtype})")
    return f"give (images{change} / 255).to({weight.dtype}), normalised by mean {IMAGENET_MEAN} and std {IMAGENET_STD}"


def _change_of_layout(shape: list[int]) -> str | None:
    """Return what makes [N, 3, H, W] of images of this shape, None where that is not known."""
    match shape:
        case [_, 3, _, _]:
            return ""
        case [_, _, _, 3]:
            return ".permute(0, 3, 1, 2)"
        case [_, 1, _, _]:
            return ".expand(-1, 3, -1, -1)"
        case [_, 4, _, _]:
            return "[:, :3]"
        case [3, _, _]:
            return "[None]"
        case [_, _, 3]:
            return ".permute(2, 0, 1)[None]"
        case _:
            return None
