"""Laws of pretrained weights of torchvision and timm: taken from where these packages keep what they fetched."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from fastbyol.cli.encoders import open_encoder
from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.model.byol import BYOL
from fastbyol.recipes import named
from fastbyol.train import start
from fastbyol.weights import packages, read

pytestmark = pytest.mark.peers
REPOSITORY = "models--timm--resnet18.a1_in1k"  # of timm's default weights, in the cache of huggingface_hub


def test_torchvisions_weights_start_a_run(
    torchvision: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    peer = torchvision.models.resnet18()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(peer.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    recipe = named("imagenet100_rn18")
    model = BYOL(recipe.encoder, recipe.head, seed=0)
    line = start.start_(model, read("torchvision:resnet18"))
    assert line == "starts from torchvision:resnet18: encoder; fc.weight, fc.bias are not used"
    peer.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 96)
    found = open_encoder("torchvision:resnet18", notify=print)
    assert (found.config, found.px, found.margin) == (EncoderConfig("resnet18"), 224, 0.875)
    assert model.target is not None
    with torch.inference_mode():
        expected = peer.eval()(images)
        for encoder in (found.encoder, model.eval().online.encoder, model.target.eval().encoder):
            torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_timms_weights_are_its_own(
    torchvision: ModuleType,  # noqa: ARG001 - timm imports it
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm, constants = pytest.importorskip("timm"), pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    peer, commit = timm.create_model("resnet18"), "0" * 40
    snapshot = tmp_path / REPOSITORY / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / REPOSITORY / "refs").mkdir()
    (tmp_path / REPOSITORY / "refs" / "main").write_text(commit)
    save_file(peer.state_dict(), snapshot / "model.safetensors")
    found = open_encoder("timm:resnet18", notify=print)
    assert (found.config, found.px, found.margin) == (EncoderConfig("resnet18"), 224, 0.875)
    state = found.encoder.state_dict()
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_name_that_a_package_does_not_know_is_one_line(torchvision: ModuleType, package: str) -> None:  # noqa: ARG001
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=rf"{package}:resnet19 cannot be loaded \(.+\); give a network that"):
        packages.pretrained(package, "resnet19")
