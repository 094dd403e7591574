"""FLOPs of a training image and peak FLOP/s of GPUs, for the model FLOP utilisation (MFU)."""

from __future__ import annotations

import re

import torch
from torch import nn

from fastbyol.byol import BYOL, VIEWS
from fastbyol.config import Recipe
from fastbyol.encoder import ResNet

PASSES_ONLINE = 3  # the forward, and the backward's two products for each one of the forward
PASSES_TARGET = 1

# Dense peaks in TFLOP/s: (bfloat16, TF32), both with float32 accumulation; names as torch.cuda.get_device_name gives
# them. float32 runs are compared with TF32 where there is one, because cuDNN's convolutions use it by default; a GPU
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
    """Count the floating-point operations of a training step per image, for both views of crop_px pixels a side.

    Convolutions and linear layers alone, a multiply-add as two: forward and backward of the online network and forward
    of the target, where there is one, for each view. The stem's gradient with respect to the images is counted, though
    it is never computed.
    """
    with torch.device("meta"):
        model = BYOL(recipe.encoder, recipe.head, seed=0)
    branch = encoder_multiply_adds(model.online.encoder, px=crop_px) + head_multiply_adds(model.online.projector)
    predictor = head_multiply_adds(model.predictor)
    passes_target = PASSES_TARGET if recipe.objective.has_target else 0  # else the online projections are the targets
    return 2 * VIEWS * (PASSES_ONLINE * (branch + predictor) + passes_target * branch)


def encoder_multiply_adds(encoder: ResNet, *, px: int) -> int:
    """Count the multiply-adds of the encoder's convolutions for one image of px pixels a side.

    Computed from the layers' sizes, on any device: a forward on device meta would cost a second of imports in torch.
    """
    side, total = _convolution_cost(encoder.conv1, px)
    if isinstance(encoder.maxpool, nn.MaxPool2d):
        side = _output_side(encoder.maxpool, side)
    for stage in encoder.stages:
        for block in encoder.get_submodule(stage).children():
            if isinstance(block.downsample, nn.Sequential):
                total += _convolution_cost(block.downsample[0], side)[1]
            for convolution in block.children():
                if isinstance(convolution, nn.Conv2d):
                    side, macs = _convolution_cost(convolution, side)
                    total += macs
    return total


def head_multiply_adds(head: nn.Module) -> int:
    """Count the multiply-adds of a projector or predictor for one image."""
    return sum(layer.weight.numel() for layer in head.modules() if isinstance(layer, nn.Linear))


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


class Meter:
    """The MFU of a run: its images/s against the peak of its GPUs.

    device_name: as torch.cuda.get_device_name gives it, None on a CPU; gpus: the number that the images/s are of.
    """

    def __init__(self, recipe: Recipe, *, device_name: str | None, precision: str, gpus: int = 1) -> None:
        self._recipe = recipe
        peak = None if device_name is None else peak_flops(device_name, precision)
        self._peak = None if peak is None else peak * gpus
        self._flops_per_image: dict[int, float] = {}  # by crop_px

    def read(self, images_per_s: float, *, crop_px: int) -> dict[str, float]:
        """Return {"mfu": model FLOP utilisation in [0, 1]} for a row; {} where the GPU's peak is not known.

        Source: Chowdhery et al. 2022.
        """
        if self._peak is None:
            return {}
        if crop_px not in self._flops_per_image:
            self._flops_per_image[crop_px] = train_flops_per_image(self._recipe, crop_px=crop_px)
        return {"mfu": images_per_s * self._flops_per_image[crop_px] / self._peak}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return a GPU's dense peak in FLOP/s for precision "bfloat16" or "float32"; None where it is not known.

    device_name: as torch.cuda.get_device_name gives it. Slices of a GPU (MIG) and laptop GPUs have other peaks than
    their namesakes and are not known.
    """
    for pattern, (bfloat16, tf32) in PEAKS_TFLOPS.items():
        if re.fullmatch(pattern, device_name):
            tflops = bfloat16 if precision == "bfloat16" else tf32
            return None if tflops is None else tflops * 1e12
    return None
