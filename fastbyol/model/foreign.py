"""Networks of others as encoders: any module that maps images [N, C, H, W] to representations [N, features]."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError, require
from fastbyol.model.base_encoder import Encoder
from fastbyol.model.batchnorm import TakesViews, replace_norms_

PROBE_PX = 224  # side of the images that tell the length of a representation where a network has no attribute for it


class Foreign(Encoder, TakesViews):
    """A network of another library, or of the user's, as an encoder.

    Parameters and buffers have the network's own names, since the encoder shares its tables of them. `each_view`: in
    training each view is a forward of its own, because a batch norm of the network cannot be replaced by one of
    fastbyol.model.batchnorm.
    """

    network: nn.Module

    def __init__(
        self, network: nn.Module, config: EncoderConfig, *, features: int, views: int, each_view: bool
    ) -> None:
        super().__init__()
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = network.__dict__[table]
        own: dict[str, Any] = {"network": network, "config": config, "features": features, "views": views}
        self.__dict__.update(own, each_view=each_view)  # a network may have layers of these names, as torchvision's do

    def train(self, mode: bool = True) -> Foreign:
        """Set train or evaluation mode, of the network, too, which is no layer of its own."""
        self.network.train(mode)
        super().train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, C, H, W] to representations [N, features]; raise ConfigError where the network does not."""
        px = fixed_px(self.network)
        if px is not None and images.shape[2:] != (px, px):
            raise ConfigError(
                f"encoder {self.config.arch} takes images of {px} px alone, and these are {images.shape[2]} x "
                f"{images.shape[3]}; give +crop_px={px}+eval_px={px} without local views, or a network that takes "
                "other sizes"
            )
        patch = patch_px(self.network)
        if patch is not None and (images.shape[2] % patch or images.shape[3] % patch):
            raise ConfigError(
                f"encoder {self.config.arch} cuts images into patches of {patch} px, and these are {images.shape[2]} x "
                f"{images.shape[3]}; give multiples of {patch} as +crop_px=PX+eval_px=PX, +local_px, --crop-ramp "
                "and --px"
            )
        if self.each_view and self.training and self.views > 1:
            return torch.cat([self._represent(view) for view in images.chunk(self.views)])
        return self._represent(images)

    def _represent(self, images: Tensor) -> Tensor:
        images = self.take_channels(images)
        found: Any = self.network(images)
        wanted = (len(images), self.features)
        if not isinstance(found, Tensor) or found.shape != wanted:
            came = f"{list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ConfigError(
                f"encoder {self.config.arch} maps images {list(images.shape)} to {came}; wanted representations "
                f"{list(wanted)}: pool them, and give their length as num_features"
            )
        return found

    def feature_map(self, images: Tensor) -> Tensor:
        """Map images to the last feature map [N, features, h, w], by forward_features or the layer `features`."""
        find = getattr(self.network, "forward_features", None) or self._modules.get("features")
        found = None if find is None else find(self.take_channels(images))
        if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[1] != self.features:
            return super().feature_map(images)
        return found

    def multiply_adds(self, *, px: int) -> int:
        """Count the multiply-adds of convolutions, linear layers and attention for one image, by a forward of it."""
        weight = next(self.parameters())
        copied = self.with_views(1).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copied(weight.new_zeros(1, self.config.channels, px, px))
        return int(counter.get_total_flops()) // 2


def fixed_px(network: nn.Module) -> int | None:
    """Return the only side of images that a network takes, as it tells in its attributes; None where it takes others.

    They are torchvision's `image_size` and timm's `patch_embed.img_size`, where that is strict.
    """
    patches = getattr(network, "patch_embed", None)
    if getattr(patches, "strict_img_size", False):
        size: Any = getattr(patches, "img_size", None)
        return None if size is None else int(size[0])
    px = getattr(network, "image_size", None)
    return px if isinstance(px, int) else None


def patch_px(network: nn.Module) -> int | None:
    """Return the side of a timm network's patches where it refuses images that they do not divide, else None."""
    patches = getattr(network, "patch_embed", None)
    size: Any = getattr(patches, "patch_size", None)
    return None if size is None or getattr(patches, "dynamic_img_pad", False) else int(size[0])


def adapt(network: nn.Module, config: EncoderConfig, *, views: int) -> Foreign:
    """Make an encoder of a network that was just built, on the CPU.

    Its batch norms take statistics per view, or each view is a forward of its own. Dropout and stochastic depth are
    switched off: a resumed run would draw others. timm's networks lose their classifier. Raises ConfigError where the
    network has parts of no known size.
    """
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(0)  # type: ignore[operator]  # timm's method
    others = replace_norms_(network, views=views)
    if others:
        _say(
            f"encoder {config.arch} has batch norms of kind {', '.join(others)}, which take no statistics per view; "
            "each view is a forward of its own (what that costs: docs/encoders.md)"
        )
    if _stop_drawing_(network):
        _say(f"encoder {config.arch} has dropout or stochastic depth; it is off, so that a resumed run is bit-equal")
    encoder = Foreign(network, config, features=_features(network, config), views=views, each_view=bool(others))
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch's stubs know only devices and dtypes


@contextmanager
def draw_weights(seed: int | None) -> Iterator[None]:
    """Build networks in the with-block on the CPU, from weights that depend on the seed alone.

    torch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0 if seed is None else seed)
        yield


@functools.cache
def _say(line: str) -> None:
    logging.getLogger(__name__).warning("%s", line)


def _stop_drawing_(network: nn.Module) -> bool:
    """Set the rates of dropout and stochastic depth to 0; tell whether any was above."""
    found = False
    for layer in network.modules():
        for name in ("p", "drop_prob", "prob", "dropout"):
            if _is_rate(layer, name):
                found |= getattr(layer, name) > 0
                setattr(layer, name, 0.0)
    return found


def _is_rate(layer: nn.Module, name: str) -> bool:
    kind = type(layer).__name__
    is_drawn = "Drop" in kind or kind in ("StochasticDepth", "MultiheadAttention")
    return is_drawn and isinstance(getattr(layer, name, None), float)


def _features(network: nn.Module, config: EncoderConfig) -> int:
    """Return the length of a representation: an attribute of the network, or what it gives for an image of PROBE_PX."""
    for name in ("head_hidden_size", "num_features", "features"):
        found = getattr(network, name, None)
        if isinstance(found, int):
            return found
    mode = network.training
    with torch.no_grad():
        weight = next(network.parameters(), torch.empty(0))
        result = network.eval()(weight.new_zeros(1, config.channels, PROBE_PX, PROBE_PX))
    network.train(mode)
    require(
        isinstance(result, Tensor) and result.ndim == 2,
        f"encoder {config.arch} has no num_features and maps an image of {PROBE_PX} px to no [1, features]; set "
        "num_features to the length of a representation",
    )
    return int(result.shape[1])
