"""Laws of export against the libraries it is for: the same features, out of their own networks."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastbyol.config import EncoderConfig
from fastbyol.export import IN_FOLDER, formats, load_encoder, save_encoder
from fastbyol.model.resnet import ResNet, build
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL

pytestmark = pytest.mark.peers


def moved(arch: str) -> ResNet:
    """Build an encoder whose running statistics have moved."""
    encoder = build(EncoderConfig(arch), seed=0)
    encoder(torch.randn(4, 3, 64, 64))
    return encoder.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvisions_resnet_gives_the_same_features(torchvision: ModuleType, arch: str, tmp_path: Path) -> None:
    models = torchvision.models
    encoder = moved(arch)
    formats.write("pth", tmp_path / "e.pth", encoder, EncoderConfig(arch), px=224)
    peer = getattr(models, arch)()
    found = peer.load_state_dict(torch.load(tmp_path / "e.pth", weights_only=True), strict=False)
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"}
    assert not found.unexpected_keys
    peer.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 96, 128)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), peer.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_encoder_is_torchvisions_resnet(
    torchvision: ModuleType, arch: str, training: bool, tmp_path: Path
) -> None:
    save_encoder(tmp_path / "encoder.safetensors", moved(arch), EncoderConfig(arch))
    ours = load_encoder(tmp_path).double().train(training)
    peer = getattr(torchvision.models, arch)().double().train(training)
    peer.fc = torch.nn.Identity()
    peer.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(peer.state_dict())
    images = torch.randn(5, 3, 64, 80, dtype=torch.float64)
    results = ours(images), peer(images)
    close = {"rtol": FLOAT64_RTOL, "atol": FLOAT64_ATOL}
    torch.testing.assert_close(*results, **close)
    for result in results:
        result.square().sum().backward()
    for parameter, twin in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, **close)
    torch.testing.assert_close(ours.state_dict(), peer.state_dict(), **close)


def test_torchvisions_detector_and_segmenter_take_the_encoder(torchvision: ModuleType, tmp_path: Path) -> None:
    detection, segmentation = torchvision.models.detection, torchvision.models.segmentation
    encoder = moved("resnet50")
    formats.write("pth", tmp_path / "e.pth", encoder, EncoderConfig("resnet50"), px=224)
    state = torch.load(tmp_path / "e.pth", weights_only=True)
    detector = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    detector.backbone.body.load_state_dict(state)  # strict
    segmenter = segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    segmenter.backbone.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = detector.eval().backbone.body(images)["3"]
        torch.testing.assert_close(encoder.feature_map(images), maps, rtol=1e-4, atol=1e-4)
        assert segmenter.eval()(images)["out"].shape == (1, 21, 64, 64)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timms_resnet_gives_the_same_features(torchvision: ModuleType, arch: str, tmp_path: Path) -> None:  # noqa: ARG001
    timm = pytest.importorskip("timm")
    encoder = moved(arch)
    formats.write("timm", tmp_path / "e.pth", encoder, EncoderConfig(arch), px=224)
    peer = timm.create_model(arch, num_classes=0, checkpoint_path=str(tmp_path / "e.pth")).eval()
    images = torch.randn(2, 3, 96, 128)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), peer(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timm_builds_the_encoder_from_an_exported_folder(torchvision: ModuleType, arch: str, tmp_path: Path) -> None:  # noqa: ARG001
    timm = pytest.importorskip("timm")
    encoder = moved(arch)
    formats.write("timm", tmp_path / "model.safetensors", encoder, EncoderConfig(arch), px=128, margin=0.875)
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 96, 128)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), peer(images), rtol=1e-4, atol=1e-5)
    data = timm.data.resolve_model_data_config(peer)
    assert (tuple(data["input_size"]), data["crop_pct"], data["crop_mode"]) == ((3, 128, 128), 0.875, "center")
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10)(images).shape == (2, 10)


def test_an_exported_folder_has_the_names_that_timm_asks_a_hub_for(torchvision: ModuleType, tmp_path: Path) -> None:  # noqa: ARG001
    timm = pytest.importorskip("timm")
    formats.write("timm", tmp_path / "model.safetensors", moved("resnet18"), EncoderConfig("resnet18"), px=224)
    assert IN_FOLDER == timm.models._hub.HF_SAFE_WEIGHTS_NAME
    described = json.loads((tmp_path / "config.json").read_text())
    settings, name, arguments = timm.models._hub._parse_model_cfg(described, {"source": "hf-hub"})
    assert (name, arguments) == ("resnet18", {})
    assert timm.models._pretrained.PretrainedCfg(**settings).num_classes == 0
