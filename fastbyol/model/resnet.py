"""ResNets with per-view batch norm: post-activation, stride on the 3x3, torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastbyol.config import EncoderConfig
from fastbyol.errors import require
from fastbyol.kernels.stem import stem_convolution
from fastbyol.model.batchnorm import BatchNormAct2d, BatchNormAddReLU2d, convolve, normalize_and_pool, normalize_then
from fastbyol.model.padding import SameConv2d, SameNormedMaxPool, padded_convolution
from fastbyol.model.parts import Encoder

Twins = tuple[Tensor, Tensor]  # a feature map, once for a block's convolutions and once for its shortcut


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, *, stride: int, views: int, padding: str) -> None:
        super().__init__()
        self.conv1 = padded_convolution(inputs, planes, 3, stride, padding=padding)
        self.bn1 = BatchNormAct2d(planes, views=views)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = BatchNormAddReLU2d(planes, views=views)
        self.downsample = _shortcut(inputs, planes, stride=stride, views=views)

    def forward(self, twins: Twins) -> Twins:
        """Map [N, C, H, W] to [N, planes, H/stride, W/stride]."""
        x, shortcut = twins
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        z: Twins = self.bn2(normalize_then(self.bn1, self.conv1(x), self.conv2), shortcut)
        return z


class Bottleneck(nn.Module):
    """Residual block of a 1x1 convolution down, a strided 3x3 and a 1x1 up to four times the planes."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, *, stride: int, views: int, padding: str) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = BatchNormAct2d(planes, views=views)
        self.conv2 = padded_convolution(planes, planes, 3, stride, padding=padding)
        self.bn2 = BatchNormAct2d(planes, views=views)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = BatchNormAddReLU2d(outputs, views=views)
        self.downsample = _shortcut(inputs, outputs, stride=stride, views=views)

    def forward(self, twins: Twins) -> Twins:
        """Map [N, C, H, W] to [N, 4*planes, H/stride, W/stride]."""
        x, shortcut = twins
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x, *statistics = convolve(self.conv1, x, self.bn1)
        x = normalize_then(self.bn1, x, self.conv2, *statistics)
        x, *statistics = normalize_then(self.bn2, x, partial(convolve, self.conv3, norm=self.bn3))
        z: Twins = self.bn3(x, shortcut, *statistics)
        return z


class Shortcut(nn.Sequential):
    """A 1x1 convolution and batch norm without ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, views: int) -> None:
        convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        super().__init__(convolution, BatchNormAct2d(outputs, views=views, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""
        convolution, norm = self
        z: Tensor = norm(*convolve(convolution, x, norm))
        return z


def _shortcut(inputs: int, outputs: int, *, stride: int, views: int) -> Shortcut | None:
    return None if stride == 1 and inputs == outputs else Shortcut(inputs, outputs, stride=stride, views=views)


ARCHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet8": (BasicBlock, (1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
}


class StemConv2d(nn.Conv2d):
    """The convolution of the ImageNet stem: 7x7, stride 2, padding 3, without bias.

    Attribute `recomputes`: whether the backward prepares the images anew, see kernels/stem.py.
    """

    recomputes = False

    def __init__(self, planes: int) -> None:
        super().__init__(3, planes, 7, 2, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to [N, planes, H/2, W/2]."""
        return stem_convolution(images, self.weight, recomputes=self.recomputes)


class NormedMaxPool(nn.MaxPool2d):
    """Max pooling 3x3, stride 2, padding 1, of a batch norm with ReLU; returns its result twice, once per consumer."""

    def __init__(self) -> None:
        super().__init__(3, 2, 1)

    def forward(self, x: Tensor, norm: nn.Module) -> Twins:  # type: ignore[override]  # the norm before it, too
        """Map [N, C, H, W] to [N, C, H/2, W/2]; `norm` is computed here, with the pooling where that is faster."""
        return normalize_and_pool(norm, x)


class NoPool(nn.Identity):
    """The stem of small images, which does not pool: batch norm with ReLU, returned twice, once per consumer."""

    def forward(self, x: Tensor, norm: nn.Module) -> Twins:  # type: ignore[override]  # the norm before it, too
        """Return norm(x) [N, C, H, W] twice."""
        y: Tensor = norm(x)
        return y, y


def _imagenet_stem(channels: int, planes: int, padding: str) -> tuple[nn.Conv2d, nn.Module]:
    """Build a 7x7 convolution at stride 2 and its pooling; ours is for RGB with torchvision's padding."""
    if padding == "same":
        return SameConv2d(channels, planes, 7, 2), SameNormedMaxPool()
    convolution = StemConv2d(planes) if channels == 3 else nn.Conv2d(channels, planes, 7, 2, 3, bias=False)
    return convolution, NormedMaxPool()


STEMS: dict[str, Callable[[int, int, str], tuple[nn.Conv2d, nn.Module]]] = {  # of channels of images, planes, padding
    "imagenet": _imagenet_stem,
    "cifar": lambda channels, planes, padding: (padded_convolution(channels, planes, 3, 1, padding=padding), NoPool()),
    "cifar_stride2": lambda channels, planes, padding: (
        padded_convolution(channels, planes, 3, 2, padding=padding),
        NoPool(),
    ),
}


class ResNet(Encoder):
    """A ResNet without its classifier: images [N, 3, H, W] to representations [N, features].

    The width multiplies the channels of the stem and of every stage (paper, section 3.2), unlike torchvision's wide
    ResNets. Source: He et al. 2015; stride placement as in torchvision.
    """

    def __init__(self, config: EncoderConfig, *, views: int = 1) -> None:
        super().__init__()
        require(config.arch in ARCHS, f"encoder is {config.arch!r}; give one of {', '.join(ARCHS)}")
        require(config.stem in STEMS, f"stem is {config.stem!r}; give one of {', '.join(STEMS)}")
        stem_planes = round(64 * config.width)
        require(stem_planes >= 1, f"encoder width {config.width} leaves no channels; give 1/64 or more")
        block, depths = ARCHS[config.arch]
        self.conv1, self.maxpool = STEMS[config.stem](config.channels, stem_planes, config.padding)
        self.bn1 = BatchNormAct2d(stem_planes, views=views)
        inputs = stem_planes
        self.stages: list[str] = []
        for number, depth in enumerate(depths):
            planes = stem_planes * 2**number
            blocks = []
            for index in range(depth):
                stride = 2 if number > 0 and index == 0 else 1
                blocks.append(block(inputs, planes, stride=stride, views=views, padding=config.padding))
                inputs = planes * block.expansion
            self.stages.append(f"layer{number + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.config, self.features = config, inputs
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs know only devices and dtypes

    def set_recompute(self, enabled: bool) -> None:
        """Choose whether the backward recomputes the inputs of convolutions, where that is cheap, or keeps them."""
        for layer in self.modules():
            if isinstance(layer, BatchNormAct2d | StemConv2d):
                layer.recomputes = enabled

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to pooled representations [N, features]."""
        features = self.feature_map(images)
        # as [N, H*W, C], whose gradient torch writes in channels-last memory: that of a mean over (2, 3) is copied
        return features.permute(0, 2, 3, 1).flatten(1, 2).mean(1)

    def feature_map(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to the last feature map [N, features, h, w]."""
        twins: Twins = self.maxpool(self.conv1(self.take_channels(images)), self.bn1)
        for stage in self.stages:
            twins = self.get_submodule(stage)(twins)
        return twins[0]

    def multiply_adds(self, *, px: int) -> int:
        """Count the multiply-adds of the convolutions for one image of px pixels a side.

        Computed from the layers' sizes, on any device: a forward on device meta would cost a second of imports in
        torch.
        """
        side, total = _convolution_cost(self.conv1, px)
        if isinstance(self.maxpool, nn.MaxPool2d):
            side = _output_side(self.maxpool, side)
        for stage in self.stages:
            for block in self.get_submodule(stage).children():
                if isinstance(block.downsample, nn.Sequential):
                    total += _convolution_cost(block.downsample[0], side)[1]
                for convolution in block.children():
                    if isinstance(convolution, nn.Conv2d):
                        side, cost = _convolution_cost(convolution, side)
                        total += cost
        return total


def _output_side(window: nn.Conv2d | nn.MaxPool2d, side: int) -> int:
    """Return the side of a square feature map after a convolution or pooling."""
    size, stride, padding = (
        value if isinstance(value, int) else int(value[0])
        for value in (window.kernel_size, window.stride, window.padding)
    )
    return (side + 2 * padding - size) // stride + 1


def _convolution_cost(convolution: nn.Module, side: int) -> tuple[int, int]:
    """Return the side of a convolution's output and its multiply-adds: every weight once for every output pixel."""
    assert isinstance(convolution, nn.Conv2d)
    side = _output_side(convolution, side)
    return side, side * side * convolution.weight.numel()


def init_(module: nn.Module, generator: torch.Generator) -> None:
    """Draw convolution and linear weights from a normal of std 1/sqrt(fan_in), truncated at 2 std; zero the biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build(config: EncoderConfig, *, seed: int | None, views: int = 1) -> ResNet:
    """Build a ResNet in channels-last memory whose weights depend only on (config, seed); None: for others' weights."""
    encoder = ResNet(config, views=views)
    if seed is not None:
        init_(encoder, torch.Generator().manual_seed(seed))
    return encoder
