"""A ResNet in evaluation whose batch norms are part of its convolutions, as the target on running statistics can be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.batchnorm import BatchNormAct2d, BatchNormAddReLU2d
from fastbyol.encoder import BasicBlock, Bottleneck, ResNet, average_pool
from fastbyol.errors import ConfigError, require
from fastbyol.kernels.convolution import Epilogue
from fastbyol.kernels.fold_norms import Workspace, fold_norms
from fastbyol.kernels.reference import Fold
from fastbyol.parts import Encoder

Norm = BatchNormAct2d | BatchNormAddReLU2d


class FoldedResNet:
    """The forward of a ResNet in evaluation, without gradients, by folded convolutions.

    Weights and statistics stay the encoder's own and are folded anew at each call, since every step moves them. The
    stem is the encoder's: a 7x7 convolution with an epilogue is slow in cuDNN (pytorch issue 68506). Raises ConfigError
    for an encoder that is not a ResNet of fastbyol.
    """

    def __init__(self, encoder: Encoder) -> None:
        if type(encoder) is not ResNet:
            raise ConfigError(
                f"folded_target with encoder {encoder.config.arch}, but only fastbyol's own ResNets can be folded; "
                "leave folded_target out"
            )
        require(
            encoder.config.padding == "symmetric",
            f"folded_target with padding {encoder.config.padding}, which folded convolutions lack; leave one out",
        )
        self.encoder = encoder
        self.epilogue = Epilogue()
        self._workspace = Workspace()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to pooled representations [N, features]."""
        assert not self.encoder.training, "batch statistics cannot be folded"
        x: Tensor = self.encoder.maxpool(self.encoder.conv1(self.encoder.take_channels(images)), self.encoder.bn1)[0]
        folded = iter(fold_norms(list(self._folds()), dtype=x.dtype, workspace=self._workspace))
        for block in self._blocks():
            projection, shortcut = _projection(block), x
            if projection is not None:  # its bias is part of the last convolution's
                shortcut = F.conv2d(x, next(folded).weight, stride=projection[0].stride)
            *inner, last = (convolution for convolution, _ in _layers(block))
            for convolution in inner:
                x = self._convolve(convolution, x, *next(folded), None)
            x = self._convolve(last, x, *next(folded), shortcut)
        return average_pool(x)

    def _blocks(self) -> Iterator[BasicBlock | Bottleneck]:
        for stage in self.encoder.stages:
            yield from self.encoder.get_submodule(stage).children()  # type: ignore[misc]  # the blocks of a stage

    def _folds(self) -> Iterator[Fold]:
        """Yield what is folded, in the order of the forward."""
        for block in self._blocks():
            projection, shared = _projection(block), None
            if projection is not None:
                shared = projection[1]._params()
                yield Fold(projection[0].weight, shared, None)
            *inner, (last, last_norm) = _layers(block)
            for convolution, norm in inner:
                yield Fold(convolution.weight, norm._params(), None)
            yield Fold(last.weight, last_norm._params(), shared)

    def _convolve(
        self, convolution: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
    ) -> Tensor:
        stride, padding = convolution.stride[0], convolution.padding[0]
        assert isinstance(padding, int)
        return self.epilogue(x, weight, bias, residual, stride=stride, padding=padding)


def _projection(block: BasicBlock | Bottleneck) -> tuple[nn.Conv2d, Norm] | None:
    """Return the convolution and batch norm of a block's shortcut, None where it is the identity."""
    if block.downsample is None:
        return None
    convolution, norm = block.downsample
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, BatchNormAct2d)
    return convolution, norm


def _layers(block: BasicBlock | Bottleneck) -> list[tuple[nn.Conv2d, Norm]]:
    """List the other convolutions of a block and the batch norms after them."""
    layers: list[tuple[nn.Conv2d, Norm]] = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    return [*layers, (block.conv3, block.bn3)] if isinstance(block, Bottleneck) else layers
