"""Laws of export: the encoder comes back as it was, under torchvision's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbyol.config import EncoderConfig
from fastbyol.encoder import build
from fastbyol.errors import ConfigError
from fastbyol.export import load_encoder, save_encoder


def test_an_encoder_comes_back_as_it_was(tmp_path: Path) -> None:
    config = EncoderConfig("resnet18", width=0.125, stem="cifar")
    encoder = build(config, seed=0)
    encoder(torch.randn(8, 3, 32, 32))  # moves the running statistics
    save_encoder(tmp_path / "encoder.safetensors", encoder, config)
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(images), encoder.eval()(images))


def test_names_are_torchvisions(tmp_path: Path) -> None:
    config = EncoderConfig("resnet18", width=0.125)
    save_encoder(tmp_path / "e.safetensors", build(config, seed=0), config)
    stored = json.loads((Path(__file__).parents[1] / "data" / "torchvision_resnets.json").read_text())["models"][
        "resnet18"
    ]
    assert set(load_file(tmp_path / "e.safetensors")) == {
        line.split()[0] for line in stored if not line.startswith("fc.")
    }


@pytest.mark.parametrize(
    "content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "], ids=["missing", "empty", "foreign"]
)
def test_what_is_no_encoder_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "encoder.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="not an encoder exported by fastbyol"):
        load_encoder(path)
