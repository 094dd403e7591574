"""Laws of the count of floating-point operations and of the GPUs' peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig
from fastbyol.model.byol import BYOL
from fastbyol.model.resnet import ResNet
from fastbyol.monitor.flops import Meter, peak_flops, train_flops_per_image
from fastbyol.recipes import named


def resnet50_macs() -> int:
    """Add up ResNet-50 at 224 px by hand: stem, then per stage the 1x1, 3x3, 1x1 of each block and one shortcut."""
    macs = 112 * 112 * 64 * 3 * 7 * 7
    inputs, side = 64, 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        planes = 64 << stage
        for block in range(depth):
            stride = 2 if stage and block == 0 else 1
            macs += side**2 * inputs * planes  # before the stride
            side //= stride
            macs += side**2 * (9 * planes * planes + planes * 4 * planes)
            macs += side**2 * inputs * 4 * planes if block == 0 else 0
            inputs = 4 * planes
    return macs


def test_resnet50_takes_the_published_multiply_adds() -> None:
    with torch.device("meta"):
        macs = ResNet(EncoderConfig("resnet50")).multiply_adds(px=224)
    assert macs == resnet50_macs()
    assert (macs + 2048 * 1000) / 1e9 == pytest.approx(4.09, abs=0.005)  # with the classifier, as it is published


def test_a_step_is_three_passes_online_and_one_of_the_target() -> None:
    recipe = named("imagenet_rn50")
    projector, predictor = 2048 * 4096 + 4096 * 256, 256 * 4096 + 4096 * 256
    branch = resnet50_macs() + projector
    assert train_flops_per_image(recipe, crop_px=224) == 2 * 2 * (3 * (branch + predictor) + branch)


@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "cifar_stride2"), ("resnet50", "imagenet")])
@pytest.mark.parametrize("target", ["ema", "constant", "stop-gradient"])
def test_the_count_is_torchs_own(arch: str, stem: str, target: str) -> None:
    px = 21
    encoder = EncoderConfig(arch, width=1 / 16, stem=stem)
    recipe = replace(
        named("demo"), encoder=encoder, head=HeadConfig(hidden=48, out=16), objective=ObjectiveConfig(target=target)
    )
    model = BYOL(recipe.encoder, recipe.head, seed=0, objective=recipe.objective)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(4, 3, px, px)).loss.backward()
    torchs = sum(counter.get_flop_counts()["Global"].values())
    with FlopCounterMode(display=False) as counter:
        model.online.encoder.conv1(torch.rand(4, 3, px, px))
    images_gradient = counter.get_total_flops()  # which nobody asks for, as torch knows
    assert torchs + images_gradient == 2 * train_flops_per_image(recipe, crop_px=px)  # two images


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100 80GB PCIe", "float32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "float32", 494.7),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA A10", "bfloat16", 125.0),
        ("NVIDIA A10G", "bfloat16", 70.0),
        ("NVIDIA A10G", "float32", 35.0),
        ("NVIDIA RTX A6000", "bfloat16", 154.8),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA B200", "bfloat16", 2250.0),
        ("Tesla V100-SXM2-16GB", "float32", 15.7),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("Some other GPU", "bfloat16", None),
    ],
)
def test_peaks_belong_to_exactly_the_named_gpu(name: str, precision: str, tflops: float | None) -> None:
    assert peak_flops(name, precision) == (None if tflops is None else tflops * 1e12)


def test_two_gpus_at_their_peak_are_utilised_wholly() -> None:
    peak = peak_flops("NVIDIA H200", "bfloat16")
    assert peak is not None
    meter = Meter(named("demo"), device_name="NVIDIA H200", precision="bfloat16", gpus=2)
    for crop_px in (24, 32, 24):
        images_per_s = 2 * peak / train_flops_per_image(named("demo"), crop_px=crop_px)
        assert meter.read(images_per_s, crop_px=crop_px) == {"mfu": pytest.approx(1.0)}


@pytest.mark.parametrize("name", [None, "Some other GPU"])
def test_where_no_peak_is_known_a_row_says_nothing_of_it(name: str | None) -> None:
    assert Meter(named("demo"), device_name=name, precision="bfloat16").read(100.0, crop_px=24) == {}
