"""Laws of export: the encoder comes back as it was, under torchvision's names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.export import load_encoder, load_fused, save_encoder
from fastbyol.model.resnet import build


def test_an_encoder_comes_back_as_it_was(tmp_path: Path) -> None:
    config = EncoderConfig("resnet18", width=0.125, stem="cifar")
    encoder = build(config, seed=0)
    encoder(torch.randn(8, 3, 32, 32))  # moves the running statistics
    save_encoder(tmp_path / "encoder.safetensors", encoder, config)
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(loaded(images), encoder.eval()(images))
    assert torch.equal(load_fused(tmp_path / "encoder.safetensors")(images), encoder(images))  # what protocols score


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    config = EncoderConfig("resnet8", width=0.25, stem="cifar")
    encoder = build(config, seed=0)
    written = set()
    for number in range(12):  # the library's order of two entries is one of two at random
        path = tmp_path / f"{number}.safetensors"
        save_encoder(path, encoder, config)
        written.add(path.read_bytes())
    assert len(written) == 1
    assert encoder.state_dict().keys() == load_file(path).keys()


def test_names_are_torchvisions(tmp_path: Path) -> None:
    config = EncoderConfig("resnet18", width=0.125)
    save_encoder(tmp_path / "e.safetensors", build(config, seed=0), config)
    stored = json.loads((Path(__file__).parents[1] / "data" / "torchvision_resnets.json").read_text())["models"][
        "resnet18"
    ]
    assert set(load_file(tmp_path / "e.safetensors")) == {
        line.split()[0] for line in stored if not line.startswith("fc.")
    }


def test_a_file_that_names_code_of_its_own_is_refused_without_importing_it(tmp_path: Path) -> None:
    path, config = tmp_path / "encoder.safetensors", EncoderConfig("this:d", width=0.125)  # a module of Python's own
    save_encoder(path, build(EncoderConfig("resnet8", width=0.125), seed=0), config)
    with pytest.raises(ConfigError, match=r"wants code of its own, 'this:d'.* trust=True"):
        load_encoder(path)
    assert "this" not in sys.modules


@pytest.mark.parametrize("arch", ["resnet19", ["resnet8"], None])
def test_a_file_of_an_unknown_encoder_is_refused(tmp_path: Path, arch: object) -> None:
    tensors = {"conv1.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "e.safetensors", {"fastbyol": json.dumps({"arch": arch, "width": 0.125})})
    for trust in (False, True):
        with pytest.raises(ConfigError):
            load_encoder(tmp_path / "e.safetensors", trust=trust)


@pytest.mark.parametrize(
    "content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "], ids=["missing", "empty", "foreign"]
)
def test_what_is_no_encoder_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "encoder.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="not an encoder exported by fastbyol"):
        load_encoder(path)
