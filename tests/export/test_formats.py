"""Laws of other libraries' formats: their names, the same values, a graph that computes what the encoder does."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import fastbyol
from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.export import formats
from fastbyol.export.network import ordinary
from fastbyol.model.parts import Encoder
from fastbyol.model.resnet import ResNet, build
from tests.support.commands import PATIENCE_S

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


@pytest.mark.parametrize("form", [lambda fused: fused, pytest.param(ordinary, marks=pytest.mark.slow)])
def test_a_graph_computes_what_the_encoder_does(form: Callable[[Encoder], Encoder], tmp_path: Path) -> None:
    encoder = form(moved(SMALL))
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
        torch.testing.assert_close(fastbyol.load_encoder(path)(images), encoder(images))


def test_what_the_package_gives_is_listed_and_declared() -> None:
    stub = ast.parse(Path(fastbyol.__file__).with_suffix(".pyi").read_text())
    declared = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    declared |= {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == set(fastbyol.__all__) == {"__version__", "load_encoder"}
    assert declared <= set(dir(fastbyol))
    assert all(hasattr(fastbyol, name) for name in declared)


@pytest.mark.slow  # unless make lint has filled mypy's cache
def test_type_checkers_know_what_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(
        "import fastbyol\nfrom torch import nn\n"
        "encoder: nn.Module = fastbyol.load_encoder('run')\n"
        "head = nn.Linear(fastbyol.load_encoder('run').features, len(fastbyol.__version__))\n"
        "fastbyol.load_decoder('run')\n"
    )
    said = subprocess.run(
        [sys.executable, "-m", "mypy", tmp_path / "use.py"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    ).stdout
    errors = [line for line in said.split("\n") if line.startswith(str(tmp_path)) and " error: " in line]
    assert len(errors) == 1, said
    assert 'Module has no attribute "load_decoder"' in errors[0]


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = fastbyol.load_decoder
