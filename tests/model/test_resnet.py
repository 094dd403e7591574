"""Laws of the ResNet family: torchvision's names, published sizes, weights that depend only on the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.model.resnet import ARCHS, STEMS, ResNet, build

TORCHVISION = json.loads((Path(__file__).parents[1] / "data" / "torchvision_resnets.json").read_text())["models"]
PUBLISHED_PARAMETERS = {  # with the 1000-class layer: torchvision's model pages
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def on_meta(config: EncoderConfig) -> ResNet:
    with torch.device("meta"):
        return ResNet(config)


def count(encoder: ResNet) -> int:
    return sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("arch", TORCHVISION)
def test_names_and_shapes_are_torchvisions(arch: str) -> None:
    ours = {
        f"{name} {'x'.join(map(str, value.shape))}" for name, value in on_meta(EncoderConfig(arch)).state_dict().items()
    }
    assert ours == {line for line in TORCHVISION[arch] if not line.startswith("fc.")}


@pytest.mark.parametrize("arch", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(arch: str) -> None:
    encoder = on_meta(EncoderConfig(arch))
    assert count(encoder) + 1000 * encoder.features + 1000 == PUBLISHED_PARAMETERS[arch]


@pytest.mark.parametrize(
    ("arch", "width", "millions"),
    [("resnet50", 1, 24), ("resnet50", 2, 94), ("resnet50", 4, 375), ("resnet200", 2, 250)],
)
def test_parameter_counts_are_the_papers(arch: str, width: int, millions: int) -> None:
    encoder = on_meta(EncoderConfig(arch, width=width))
    assert round(count(encoder) / 1e6) == millions
    assert encoder.features == 2048 * width


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "resnet50"])
def test_representation_has_the_promised_length(arch: str, stem: str) -> None:
    encoder = build(EncoderConfig(arch, width=1 / 16, stem=stem), seed=0)
    assert encoder(torch.randn(4, 3, 33, 47)).shape == (4, encoder.features)


def test_stride_of_a_bottleneck_sits_on_the_3x3() -> None:
    encoder = on_meta(EncoderConfig("resnet50"))
    block = encoder.get_submodule("layer2.0")
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)


def test_weights_depend_only_on_the_seed() -> None:
    config = EncoderConfig("resnet8", width=0.25)
    first, again, other = (build(config, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_initial_weights_are_a_truncated_normal_of_fan_in() -> None:
    weight = build(EncoderConfig("resnet18"), seed=0).get_submodule("layer3.0").conv2.weight
    std = (256 * 9) ** -0.5
    assert weight.abs().max() <= 2 * std
    assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.01)  # a unit normal cut at 2 has std .8796


def test_batch_norm_starts_as_the_identity() -> None:
    state = build(EncoderConfig("resnet50", width=1 / 16), seed=0).state_dict()
    assert all((value == 1).all() for name, value in state.items() if "bn" in name and name.endswith("weight"))
    assert all((value == 0).all() for name, value in state.items() if name.endswith("bias"))


@pytest.mark.parametrize(
    "settings", [{"arch": "resnet19"}, {"arch": "resnet18", "stem": "patch"}, {"arch": "resnet18", "width": 0.001}]
)
def test_an_unknown_network_is_refused_with_the_choices(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"choose one of|give"):
        ResNet(EncoderConfig(**settings))


def test_every_arch_builds() -> None:
    assert all(on_meta(EncoderConfig(arch)).features in (256, 512, 2048) for arch in ARCHS)
