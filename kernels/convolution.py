"""Convolutions whose bias, residual sum and ReLU are computed before the result is written, by cuDNN.

    z = max(conv(x, weight) + bias + residual, 0)

Bytes moved: x, the residual and z once; apart, each of bias and ReLU reads and writes z once more.

torch.cudnn_convolution_add_relu computes the epilogue in float32, and its plans are kept under its arguments but the
dtype of the bias, so that bias and input have one dtype here. torch.cudnn_convolution_relu is the same with the memory
of the result as the residual, times 0: it reads what nobody has written, and NaN there may remain. So a convolution
without residual gives its bias, [1, C, 1, 1], as the residual times 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 8  # of 16 bits: 128 bits, which cuDNN's kernels on tensor cores read at once
LARGEST = 2**31  # elements: torch splits larger convolutions, these functions do not


class Epilogue:
    """Convolutions with bias, residual and ReLU: by cuDNN on a GPU in 16 bits, else one operation after the other.

    searches: let cuDNN time its algorithms where torch.backends.cudnn.benchmark says so. It compiles the ones with an
    epilogue one by one, so otherwise its first proposal is taken. A shape that cuDNN refuses is computed plainly from
    then on; every reason to do so on a GPU is logged once.
    """

    def __init__(self, *, searches: bool = False) -> None:
        self.searches = searches
        self.reasons: set[str] = set()
        self._refused: set[tuple[object, ...]] = set()

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, stride: int, padding: int
    ) -> Tensor:
        """Convolve x [N, C, H, W] with weight [P, C, k, k], add bias [P] and residual [N, P, OH, OW], apply ReLU.

        All have one dtype. Not differentiable.
        """
        shape = (x.shape, weight.shape, stride, residual is None)
        is_asked = x.is_cuda and not torch.compiler.is_compiling()  # torch.compile fuses the operations itself
        if is_asked and shape not in self._refused and self._suits(x, weight):
            try:
                with _first_proposal(not self.searches):
                    return _by_cudnn(x, weight, bias, residual, stride=stride, padding=padding)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or not _is_refusal(error):
                    raise
                self._refused.add(shape)
                self._log_once(f"cuDNN has no convolution with an epilogue for {list(x.shape)}: {error}")
        z = F.conv2d(x, weight, bias, stride=stride, padding=padding)
        return (z if residual is None else z.add_(residual)).relu_()

    def _suits(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether cuDNN may be asked; log why not."""
        planes, channels = weight.shape[:2]
        obstacles = {
            f"convolutions in {x.dtype} have no epilogue here": x.dtype not in (torch.bfloat16, torch.float16),
            f"{channels} or {planes} channels are no multiple of {CHANNELS}": channels % CHANNELS or planes % CHANNELS,
            f"a batch of {len(x)} has 2^31 elements or more": x.numel() // channels * max(channels, planes) >= LARGEST,
            "deterministic algorithms are wanted, which cuDNN's epilogues do not promise": (
                torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
            ),
        }
        for reason, holds in obstacles.items():
            if holds:
                self._log_once(reason)
        return not any(obstacles.values())

    def _log_once(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.add(reason)
            logging.getLogger(__name__).warning("%s: bias, sum and ReLU are computed apart, which is slower", reason)


def _by_cudnn(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, stride: int, padding: int) -> Tensor:
    planes = len(bias)
    in_channels_last = bias.as_strided((1, planes, 1, 1), (planes, 1, planes, planes))  # or torch would copy it
    added, share = (in_channels_last, 0.0) if residual is None else (residual, 1.0)
    sides = [stride, stride], [padding, padding], [1, 1]
    result: Tensor = torch.cudnn_convolution_add_relu(x, weight, added, share, bias, *sides, 1)
    return result


def _is_refusal(error: RuntimeError) -> bool:
    """Tell cuDNN's refusals, also those of a torch without it, from other errors."""
    return "engine" in str(error) or "cudnn" in str(error).lower()


@contextmanager
def _first_proposal(wanted: bool) -> Iterator[None]:
    """Keep cuDNN from timing its algorithms in the with-block, if wanted."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and not wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
