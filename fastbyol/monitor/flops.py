"""FLOPs of a training image and peak FLOP/s of GPUs, for the model FLOP utilisation (MFU)."""

from __future__ import annotations

import re

import torch
from torch import nn

from fastbyol.config import Recipe
from fastbyol.model.byol import BYOL

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


def train_flops_per_image(recipe: Recipe, *, crop_px: int) -> float | None:
    """Count the floating-point operations of a training step per image, its global views of crop_px pixels a side.

    Convolutions and linear layers alone, a multiply-add as two: forward and backward of the online network for each
    view, and forward of the target, where there is one, for each global view. The stem's gradient with respect to the
    images is counted, though it is never computed. None where the encoder does not count its own.
    """
    with torch.device("meta"):
        model = BYOL(recipe.encoder, recipe.head, seed=0)
    projector, predictor = head_multiply_adds(model.online.projector), head_multiply_adds(model.predictor)
    passes_target = PASSES_TARGET if recipe.objective.has_target else 0  # else the online projections are the targets
    passes = 0.0
    for count, px in recipe.sizes_of_views(crop_px):
        encoder = model.online.encoder.multiply_adds(px=px)
        if encoder is None:
            return None
        branch = encoder + projector
        passes += count * (PASSES_ONLINE * (branch + predictor) + passes_target * branch)
        passes_target = 0  # of the local views, which come second
    return 2 * passes


def head_multiply_adds(head: nn.Module) -> int:
    """Count the multiply-adds of a projector or predictor for one image."""
    return sum(layer.weight.numel() for layer in head.modules() if isinstance(layer, nn.Linear))


class Meter:
    """The MFU of a run: its images/s against the peak of its GPUs.

    device_name: as torch.cuda.get_device_name gives it, None on a CPU; gpus: the number that the images/s are of.
    """

    def __init__(self, recipe: Recipe, *, device_name: str | None, precision: str, gpus: int = 1) -> None:
        self._recipe = recipe
        peak = None if device_name is None else peak_flops(device_name, precision)
        self._peak = None if peak is None else peak * gpus
        self._flops_per_image: dict[int, float | None] = {}  # by crop_px

    def read(self, images_per_s: float, *, crop_px: int) -> dict[str, float]:
        """Return {"mfu": model FLOP utilisation in [0, 1]} for a row; {} if a GPU's peak or the FLOPs are not known.

        Source: Chowdhery et al. 2022.
        """
        if self._peak is None:
            return {}
        if crop_px not in self._flops_per_image:
            self._flops_per_image[crop_px] = train_flops_per_image(self._recipe, crop_px=crop_px)
        flops = self._flops_per_image[crop_px]
        return {} if flops is None else {"mfu": images_per_s * flops / self._peak}


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
