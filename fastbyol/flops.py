"""Know how many floating-point operations a training image costs, and how many a GPU can do: what utilisation needs."""

from __future__ import annotations

import re

import torch
from torch import nn

from fastbyol.byol import BYOL, VIEWS
from fastbyol.config import Recipe
from fastbyol.encoder import ResNet

PASSES_ONLINE = 3  # forward, and a backward of two products for each of the forward's one
PASSES_TARGET = 1

# Dense peaks in TFLOP/s: (bfloat16, TF32), both with float32 accumulation; names as torch.cuda.get_device_name gives
# them. float32 runs count against TF32 where there is one, because cuDNN's convolutions use it by default; a GPU
# without bfloat16 units has None. Sources: NVIDIA's data sheets and architecture papers of each GPU (V100 SXM2, PCIe
# and V100S; A100; H100 SXM, PCIe, NVL; H200 SXM, NVL; L4; L40S; A10; A10G; A40; RTX A6000; "Ada GPU Architecture",
# appendix A; HGX B200); figures given with sparsity are halved.
PEAKS_TFLOPS: dict[str, tuple[float | None, float]] = {
    r"Tesla V100-SXM2-\d+GB": (None, 15.7),
    r"Tesla V100-PCIE-\d+GB": (None, 14.0),
    r"Tesla V100S-PCIE-\d+GB": (None, 16.4),
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": (312.0, 156.0),
    r"NVIDIA H100 80GB HBM3": (989.4, 494.7),
    r"NVIDIA H100 PCIe": (756.0, 378.0),
    r"NVIDIA H100 NVL": (835.5, 417.5),
    r"NVIDIA H200": (989.4, 494.7),
    r"NVIDIA H200 NVL": (835.5, 417.5),
    r"NVIDIA L4": (121.0, 60.0),
    r"NVIDIA L40S": (362.0, 183.0),
    r"(NVIDIA )?A10": (125.0, 62.5),
    r"(NVIDIA )?A10G": (70.0, 35.0),
    r"(NVIDIA )?A40": (149.7, 74.8),
    r"(NVIDIA )?RTX A6000": (154.8, 77.4),
    r"(NVIDIA )?GeForce RTX 4090": (165.2, 82.6),
    r"NVIDIA B200": (2250.0, 1100.0),
}


def train_flops_per_image(recipe: Recipe, *, crop_px: int) -> float:
    """Count the floating-point operations of a training step per image, both views, at views of crop_px pixels.

    Convolutions and linear layers alone, a multiply-add as two: forward and backward of the online network and forward
    of the target, where there is one, for each view. The stem's gradient for its images, which is never computed, is
    counted.
    """
    with torch.device("meta"):
        model = BYOL(recipe.encoder, recipe.head, seed=0)
    branch = encoder_multiply_adds(model.online.encoder, px=crop_px) + head_multiply_adds(model.online.projector)
    predictor = head_multiply_adds(model.predictor)
    passes_target = PASSES_TARGET if recipe.objective.has_target else 0  # the online projections serve twice
    return 2 * VIEWS * (PASSES_ONLINE * (branch + predictor) + passes_target * branch)


def encoder_multiply_adds(encoder: ResNet, *, px: int) -> int:
    """Count the multiply-adds of one image of px pixels a side in the encoder's convolutions.

    Reckoned from the layers' sizes, on any device: a forward on device meta would import a second's worth of torch.
    """
    side, total = _convolved(encoder.conv1, px)
    if isinstance(encoder.maxpool, nn.MaxPool2d):
        side = _side(encoder.maxpool, side)
    for stage in encoder.stages:
        for block in encoder.get_submodule(stage).children():
            if isinstance(block.downsample, nn.Sequential):
                total += _convolved(block.downsample[0], side)[1]
            for convolution in block.children():
                if isinstance(convolution, nn.Conv2d):
                    side, macs = _convolved(convolution, side)
                    total += macs
    return total


def head_multiply_adds(head: nn.Module) -> int:
    """Count the multiply-adds of one image in a projector or predictor."""
    return sum(layer.weight.numel() for layer in head.modules() if isinstance(layer, nn.Linear))


def _side(window: nn.Conv2d | nn.MaxPool2d, side: int) -> int:
    """Give the side of a square map after a window has gone over it."""
    size, stride, padding = (
        value if isinstance(value, int) else int(value[0])
        for value in (window.kernel_size, window.stride, window.padding)
    )
    return (side + 2 * padding - size) // stride + 1


def _convolved(convolution: nn.Module, side: int) -> tuple[int, int]:
    """Give the side of the map a convolution makes, and its multiply-adds: every weight once for every pixel of it."""
    assert isinstance(convolution, nn.Conv2d)
    side = _side(convolution, side)
    return side, side * side * convolution.weight.numel()


class Meter:
    """Relate the speed of a run to the peak of its GPUs; each size of views is counted once.

    device_name as torch.cuda.get_device_name gives it, None on a CPU; gpus: how many share the run's images/s.
    """

    def __init__(self, recipe: Recipe, *, device_name: str | None, precision: str, gpus: int = 1) -> None:
        self._recipe = recipe
        peak = None if device_name is None else peak_flops(device_name, precision)
        self._peak = None if peak is None else peak * gpus
        self._counted: dict[int, float] = {}

    def read(self, images_per_s: float, *, crop_px: int) -> dict[str, float]:
        """Give {"mfu": the model FLOP utilisation, a share}, for a row; {} where the peak is not known.

        Source: Chowdhery et al. 2022.
        """
        if self._peak is None:
            return {}
        if crop_px not in self._counted:
            self._counted[crop_px] = train_flops_per_image(self._recipe, crop_px=crop_px)
        return {"mfu": images_per_s * self._counted[crop_px] / self._peak}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Give a GPU's dense peak in FLOP/s for precision "bfloat16" or "float32"; None where it is not known.

    device_name as torch.cuda.get_device_name gives it. A slice of a GPU (MIG) and a laptop's GPU have other peaks than
    their namesakes and are not known.
    """
    for pattern, (bfloat16, tf32) in PEAKS_TFLOPS.items():
        if re.fullmatch(pattern, device_name):
            tflops = bfloat16 if precision == "bfloat16" else tf32
            return None if tflops is None else tflops * 1e12
    return None
