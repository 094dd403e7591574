"""Encoders as ordinary networks: ResNets of torch's own layers, equal to torchvision's without the classifier."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # torch's stubs do not export it

from fastbyol.export.check import check_call, check_images
from fastbyol.model import resnet as fused
from fastbyol.model.batchnorm import set_views_
from fastbyol.model.padding import SameMaxPool2d, padded_convolution
from fastbyol.model.parts import Encoder

torch.fx.wrap("check_images")  # a symbolic trace has no sizes to check: it records the call


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, from the layers of a fused one."""

    def __init__(self, block: fused.BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1 = block.conv1, _norm(block.bn1)
        self.conv2, self.bn2 = block.conv2, _norm(block.bn2)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(block)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, planes, H/stride, W/stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        z: Tensor = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return z


class Bottleneck(nn.Module):
    """Residual block of a 1x1 convolution, a strided 3x3 and a 1x1, from the layers of a fused one."""

    def __init__(self, block: fused.Bottleneck) -> None:
        super().__init__()
        self.conv1, self.bn1 = block.conv1, _norm(block.bn1)
        self.conv2, self.bn2 = block.conv2, _norm(block.bn2)
        self.conv3, self.bn3 = block.conv3, _norm(block.bn3)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(block)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, 4*planes, H/stride, W/stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        z: Tensor = self.relu(self.bn3(self.conv3(y)) + self.downsample(x))
        return z


class ResNet(Encoder):
    """A ResNet of torch's own layers, from those of a fused one: images [N, 3, H, W] to representations [N, features].

    Parameters, buffers and modules have torchvision's names. A network of three stages has an identity for layer4.
    """

    __jit_ignored_attributes__ = ("config", "features")  # torch.jit.script does not read their types, which are text

    def __init__(self, encoder: fused.ResNet) -> None:
        super().__init__()
        self.config, self.features = encoder.config, encoder.features
        stem, is_same = encoder.conv1, encoder.config.padding == "same"
        inputs, planes, kernel, stride = stem.in_channels, stem.out_channels, stem.kernel_size[0], stem.stride[0]
        self.conv1 = padded_convolution(inputs, planes, kernel, stride, padding=encoder.config.padding)
        self.conv1.weight = stem.weight
        self.bn1 = _norm(encoder.bn1)
        self.relu = nn.ReLU()
        pool = SameMaxPool2d() if is_same else nn.MaxPool2d(3, 2, 1)
        self.maxpool = pool if isinstance(encoder.maxpool, nn.MaxPool2d) else nn.Identity()
        stages = [_stage(encoder.get_submodule(name)) for name in encoder.stages]
        self.layer1, self.layer2, self.layer3, self.layer4 = (*stages, nn.Identity())[:4]
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stubs know only devices and dtypes

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to pooled representations [N, features]."""
        pooled: Tensor = self.avgpool(self.feature_map(images)).flatten(1)
        return pooled

    def feature_map(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to the last feature map [N, features, h, w]."""
        if not is_scripting():
            check_images(images, self.conv1.weight, self.conv1.in_channels)
            if self.conv1.in_channels == 1:
                images = self.take_channels(images)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        y: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return y


def _norm(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Make torch's batch norm of the parameters and buffers of a fused one."""
    plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(plain, name, getattr(norm, name))
    return plain


def _shortcut(block: fused.BasicBlock | fused.Bottleneck) -> nn.Module:
    if block.downsample is None:
        return nn.Identity()
    convolution, norm = block.downsample
    assert isinstance(norm, nn.BatchNorm2d)
    return nn.Sequential(convolution, _norm(norm))


def _stage(blocks: nn.Module) -> nn.Sequential:
    plain = nn.Sequential()
    for block in blocks.children():
        assert isinstance(block, fused.BasicBlock | fused.Bottleneck)
        plain.append(BasicBlock(block) if isinstance(block, fused.BasicBlock) else Bottleneck(block))
    return plain


def ordinary(encoder: Encoder) -> Encoder:
    """Return a copy of an encoder whose batch norms take a batch as one population, and that checks its images.

    A ResNet becomes one of torch's own layers, with contiguous weights. Another encoder stays of its own class.
    """
    copied = copy.deepcopy(encoder)
    if isinstance(copied, fused.ResNet):
        return ResNet(copied).train(encoder.training)
    set_views_(copied, 1)
    copied.register_forward_pre_hook(check_call)
    return copied
