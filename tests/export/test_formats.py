"""Laws of other libraries' formats: their names, the same values, a graph that computes what the encoder does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import fastbyol
from fastbyol.config import EncoderConfig
from fastbyol.encoder import ResNet, build
from fastbyol.errors import ConfigError
from fastbyol.export import formats

SMALL = EncoderConfig("resnet18", width=0.125)
DETECTRON2 = {  # as its own ResNets name them
    "conv1.weight": "stem.conv1.weight",
    "bn1.running_mean": "stem.conv1.norm.running_mean",
    "layer1.0.conv2.weight": "res2.0.conv2.weight",
    "layer2.0.bn3.bias": "res3.0.conv3.norm.bias",
    "layer3.0.downsample.0.weight": "res4.0.shortcut.weight",
    "layer4.0.downsample.1.weight": "res5.0.shortcut.norm.weight",
}


def moved(config: EncoderConfig) -> ResNet:
    """Build an encoder whose running statistics have moved."""
    encoder = build(config, seed=0)
    encoder(torch.randn(8, 3, 64, 64))
    return encoder.eval()


@pytest.mark.parametrize("name", DETECTRON2)
def test_names_are_detectron2s(name: str) -> None:
    assert formats.detectron2_name(name) == DETECTRON2[name]


def test_detectron2s_pickle_holds_every_value_once(tmp_path: Path) -> None:
    config = EncoderConfig("resnet50")
    encoder = build(config, seed=0)
    formats.write("detectron2", tmp_path / "e.pkl", encoder, config, px=224)
    held = pickle.loads((tmp_path / "e.pkl").read_bytes())
    assert held["matching_heuristics"] is True
    named = {k: v for k, v in encoder.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert held["model"].keys() == {formats.detectron2_name(name) for name in named}
    assert np.array_equal(held["model"]["res5.0.shortcut.weight"], named["layer4.0.downsample.0.weight"].numpy())


def test_a_pth_comes_back(tmp_path: Path) -> None:
    encoder = moved(SMALL)
    formats.write("pth", tmp_path / "new" / "e.pth", encoder, SMALL, px=64)
    state = torch.load(tmp_path / "new" / "e.pth", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_a_graph_computes_what_the_encoder_does(tmp_path: Path) -> None:
    encoder = moved(SMALL)
    formats.write("onnx", tmp_path / "e.onnx", encoder, SMALL, px=64)
    graph = onnx.load(str(tmp_path / "e.onnx"))
    images = torch.randn(3, 3, 48, 80)  # another number and size than the graph was traced with
    found = ReferenceEvaluator(graph).run(None, {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), encoder(images).detach(), rtol=1e-4, atol=1e-5)


def test_timm_gets_its_configuration(tmp_path: Path) -> None:
    config = EncoderConfig("resnet18")
    formats.write("timm", tmp_path / "e.pth", build(config, seed=0), config, px=128)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["architecture"] == "resnet18"
    assert described["num_features"] == 512
    assert described["pretrained_cfg"]["input_size"] == [3, 128, 128]


@pytest.mark.parametrize("kind", ["timm", "detectron2"])
@pytest.mark.parametrize(
    "config", [SMALL, EncoderConfig("resnet18", stem="cifar"), EncoderConfig("resnet8", stem="imagenet")]
)
def test_a_network_the_other_library_lacks_is_refused(kind: str, config: EncoderConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the encoder is a {config.arch} .*{kind} only has"):
        formats.write(kind, tmp_path / "e", build(config, seed=0), config, px=32)


def test_an_unknown_format_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of safetensors, pth"):
        formats.write("h5", tmp_path / "e", build(SMALL, seed=0), SMALL, px=32)


def test_an_encoder_loads_in_one_line(tmp_path: Path) -> None:
    encoder = moved(SMALL)
    formats.write("safetensors", tmp_path / "encoder.safetensors", encoder, SMALL, px=32)
    images = torch.randn(2, 3, 32, 32)
    for path in (tmp_path, tmp_path / "encoder.safetensors", str(tmp_path)):
        assert torch.equal(fastbyol.load_encoder(path)(images), encoder(images))


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = fastbyol.load_decoder
