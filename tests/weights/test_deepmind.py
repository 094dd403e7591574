"""Laws of DeepMind's checkpoints: the same numbers as their released code, and nothing in a file is ever run.

tests/data/haiku_resnet50.json holds what byol/utils/networks.py of deepmind-research computes in evaluation, under
dm-haiku 0.0.17 and jax 0.10.2, from the weights and images that tests/support/haiku.py draws: every 32nd number of the
representations, and all of the projections and predictions.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbyol.config import EncoderConfig, HeadConfig
from fastbyol.errors import ConfigError
from fastbyol.model.byol import BYOL
from fastbyol.recipes import named
from fastbyol.train import start
from fastbyol.weights import deepmind, read
from tests.support import haiku

COMPUTED = json.loads((Path(__file__).parents[1] / "data" / "haiku_resnet50.json").read_text())
RECIPE = f"imagenet_rn50+padding=same+hidden={haiku.HIDDEN}+out={haiku.OUT}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BYOL:
    """Start a model from a file in their layout."""
    with pytest.MonkeyPatch.context() as patched:
        path = haiku.write(tmp_path_factory.mktemp("deepmind") / "pretrain_res50x1.pkl", haiku.draw(), patched)
    recipe = named(RECIPE)
    started = BYOL(recipe.encoder, recipe.head, seed=0)
    assert start.start_(started, read(str(path))) == f"starts from {path}: encoder and heads"
    path.unlink()  # 140 MB
    return started.eval()


@pytest.mark.parametrize("sides", COMPUTED)
def test_the_networks_compute_what_the_released_code_computes(model: BYOL, sides: str) -> None:
    height, width = map(int, sides.split("x"))
    images = torch.from_numpy(haiku.images(height, width)).permute(0, 3, 1, 2)
    assert model.target is not None
    with torch.inference_mode():
        representations = model.online.encoder(images)
        projections = model.online.projector(representations)
        found = {
            "representations": representations[:, ::32],
            "projections": projections,
            "predictions": model.predictor(projections),
        }
        target = model.target(images)
    for name, values in COMPUTED[sides].items():
        torch.testing.assert_close(found[name], torch.tensor(values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target, projections)


def test_a_network_of_other_padding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = haiku.write(tmp_path / "small.pkl", haiku.draw("res_net50", (1, 1, 1, 1)), monkeypatch)
    weights = read(str(path))
    assert weights.config == EncoderConfig("resnet50", padding="same")
    with pytest.raises(ConfigError, match=r"with padding same, the recipe's has symmetric; give RECIPE\+padding=same"):
        start.check_network(weights, EncoderConfig("resnet50"))


def test_a_wide_network_is_known_by_its_stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = haiku.write(tmp_path / "wide.pkl", haiku.draw("res_net200", (1, 1), width=2), monkeypatch)
    config, encoder, heads = deepmind.load(path)
    assert config == EncoderConfig("resnet200", 2, padding="same")
    assert encoder["layer2.0.conv2.weight"].shape == (256, 256, 3, 3)
    assert encoder["layer1.0.downsample.1.running_var"].shape == (512,)
    assert heads["projector.0.weight"].shape == (haiku.HIDDEN, 1024)
    assert HeadConfig(haiku.HIDDEN, haiku.OUT).hidden == len(heads["predictor.0.bias"])


class Shout:
    """An object whose pickle would print."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it was run",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"experiment_state": Shout()},
            r"it names \w+.print, which no such checkpoint needs and which was not run",
        ),
        ({"experiment_state": {"online_params": {}, "online_state": {}}}, "wanted an online network with a ResNet-50"),
        ({"experiment_state": {"online_params": [], "online_state": {}}}, "a list where parameters should be"),
        ({"experiment_state": {}}, "online_params"),
    ],
)
def test_another_pickle_ends_in_one_line_and_runs_nothing(
    content: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ConfigError, match=reason):
        read(str(tmp_path / "file.pkl"))
    assert capsys.readouterr().out == ""


def test_networks_that_were_not_published_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = haiku.draw("res_net18", (1, 1))
    with pytest.raises(ConfigError, match="networks are predictor, projector, res_net18; wanted an online network"):
        deepmind.load(haiku.write(tmp_path / "file.pkl", network, monkeypatch))


def test_a_file_that_is_cut_short_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = haiku.write(tmp_path / "file.pkl", haiku.draw("res_net50", (1,)), monkeypatch)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ConfigError, match=r"is no checkpoint of DeepMind's BYOL that can be read \(pickle data was"):
        read(str(path))
