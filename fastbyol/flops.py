"""Know how many floating-point operations a training image costs, and how many a GPU can do: what utilisation needs."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from fastbyol.byol import BYOL, VIEWS
from fastbyol.config import Recipe

PASSES_ONLINE = 3  # forward, and a backward of two products for each of the forward's one
PASSES_TARGET = 1

# Dense peaks in TFLOP/s: (bfloat16, TF32), both with float32 accumulation; names as torch.cuda.get_device_name gives
# them. float32 runs count against TF32 where there is one, because cuDNN's convolutions use it by default; a GPU
# without bfloat16 units has None. Sources: NVIDIA's data sheets and architecture papers of each GPU (V100 SXM2, PCIe
# and V100S; A100; H100 SXM, PCIe, NVL; H200 SXM, NVL; L4; L40S; A10; A40; RTX A6000; "Ada GPU Architecture", appendix
# A; HGX B200); figures given with sparsity are halved.
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
    r"(NVIDIA )?A10G?": (125.0, 62.5),
    r"(NVIDIA )?A40": (149.7, 74.8),
    r"(NVIDIA )?RTX A6000": (154.8, 77.4),
    r"(NVIDIA )?GeForce RTX 4090": (165.2, 82.6),
    r"NVIDIA B200": (2250.0, 1100.0),
}


def train_flops_per_image(recipe: Recipe, *, crop_px: int) -> float:
    """Count the floating-point operations of a training step per image, both views, at views of crop_px pixels.

    Convolutions and linear layers alone, a multiply-add as two: forward and backward of the online network and forward
    of the target, for each view. The stem's gradient for its images, which is never computed, is counted.
    """
    with torch.device("meta"):
        model = BYOL(recipe.encoder, recipe.head, seed=0).eval()
        images = torch.empty(VIEWS, 3, crop_px, crop_px)
    macs = multiply_adds(model.online, images) / VIEWS
    ahead = multiply_adds(model.predictor, torch.empty(VIEWS, recipe.head.out, device="meta")) / VIEWS
    return 2 * VIEWS * (PASSES_ONLINE * (macs + ahead) + PASSES_TARGET * macs)


@torch.no_grad()
def multiply_adds(module: nn.Module, inputs: Tensor) -> int:
    """Count the multiply-adds of one forward in its convolutions and linear layers; tensors may be on device meta."""
    count = 0

    def add(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        assert isinstance(layer.weight, Tensor)
        count += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    module(inputs)
    for hook in hooks:
        hook.remove()
    return count


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


def utilisation(images_per_s: float, *, flops_per_image: float, peak: float) -> float:
    """Give the model FLOP utilisation: a share of the peak of all GPUs together. Source: Chowdhery et al. 2022."""
    return images_per_s * flops_per_image / peak
