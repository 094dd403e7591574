"""Laws of networks of others as encoders: populations per view, names, weights by seed, nothing drawn in training."""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastbyol.cli.train import main
from fastbyol.config import EncoderConfig, HeadConfig
from fastbyol.errors import ConfigError
from fastbyol.export import load_encoder
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD, LUMA
from fastbyol.model.batchnorm import Replacement, synchronize_
from fastbyol.model.byol import BYOL
from fastbyol.model.foreign import Foreign, adapt
from fastbyol.model.libraries import build_timm
from fastbyol.model.parts import build_encoder
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import named
from fastbyol.recipes.overrides import apply_change
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import Fork, wait_until
from tests.support.runs import arguments, encoders_are_equal
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL

CONFIG = EncoderConfig("mine:Net")
CLOSE = {"rtol": FLOAT64_RTOL, "atol": FLOAT64_ATOL}


class OtherNorm(nn.BatchNorm2d):
    """A batch norm with a forward of its own, which no layer of ours computes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and double."""
        return 2 * super().forward(x)


class Net(nn.Module):
    """A network with batch norms of 2, 3 and 4 dimensions, dropout, and layers called as the encoder's attributes."""

    def __init__(self, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), norm(8, eps=1e-3, momentum=0.03), nn.ReLU())
        self.config = nn.BatchNorm1d(8)
        self.last = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to representations [N, 8]."""
        rows = self.config(self.features(images).flatten(2))
        return self.last(self.drop(rows.mean(2))) * self.scale


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OtherNorm])
def test_a_step_on_two_views_is_a_forward_for_each_view(norm: type[nn.BatchNorm2d]) -> None:
    torch.manual_seed(0)
    plain = Net(norm).double()
    plain.drop.p = 0.0
    encoder = adapt(copy.deepcopy(plain), CONFIG, views=2)
    assert encoder.each_view == (norm is OtherNorm)
    assert encoder.features == 8
    views = torch.randn(6, 3, 9, 9, dtype=torch.float64)
    views[3:] += 5
    results = encoder(views), torch.cat([plain(view) for view in views.chunk(2)])
    torch.testing.assert_close(*results, **CLOSE)
    for result in results:
        result.square().sum().backward()
    for parameter, twin in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, **CLOSE)
    torch.testing.assert_close(encoder.state_dict(), plain.state_dict(), **CLOSE)
    assert list(encoder.state_dict()) == list(plain.state_dict())
    encoder.eval()
    torch.testing.assert_close(encoder(views[:1]), plain.eval()(views[:1]), **CLOSE)


def lazy() -> nn.Module:
    """Build a network whose first layer has no size before it has seen an image."""
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Tied(nn.Module):
    """A network whose second convolution and batch norm are the first ones, and whose third shares their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.first, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.second, self.again = self.first, self.norm
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.third.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to representations [N, 8]."""
        x = self.norm(self.first(self.stem(images))).relu()
        return (x + self.third(self.again(self.second(x)))).mean((2, 3))


def test_a_batch_norm_of_two_places_takes_each_view_by_itself_in_both() -> None:
    torch.manual_seed(0)
    plain = Tied().double()
    encoder = adapt(copy.deepcopy(plain), CONFIG, views=2)
    views = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    views[3:] += 5
    torch.testing.assert_close(encoder(views), torch.cat([plain(view) for view in views.chunk(2)]), **CLOSE)
    assert isinstance(encoder.norm, Replacement)
    assert encoder.norm is encoder.again
    assert encoder.third.weight is encoder.first.weight


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "muon"])
def test_a_network_with_tied_weights_trains_resumes_and_exports(
    betons: Betons, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tied", SimpleNamespace(build=Tied))
    _, *given = arguments(betons, tmp_path / "run", f"--optimizer={optimizer}", "--base-lr=0.01")
    run = RunFolder(tmp_path / "run")
    for epochs in (1, 2):  # the second time from the checkpoint
        more = [f"--epochs={epochs}", "--warmup-epochs=0", "--resume"]
        assert main(["demo+encoder=tied:build", *given, *more]) == 0
    assert [row["step"] for row in read_metrics(run.metrics)] == [*range(1, 11)]
    encoder = load_encoder(run.path, trust=True)
    assert torch.equal(encoder.first.bias, encoder.second.bias)
    assert encoder.third.weight is encoder.first.weight
    written = load_file(run.encoder)
    assert {"first.bias", "second.bias", "third.weight"} <= written.keys()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in written.items())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Net().bfloat16(), r"has a parameter scale of torch\.bfloat16; build it in torch\.float32"),
        (lambda: Net().double(), r"has a parameter scale of torch\.float64; build it in torch\.float32"),
        (lambda: nn.Sequential(Tied(), nn.Linear(8, 8).half()), r"has a parameter 1\.weight of torch\.float16"),
        (lazy, r"has a lazy parameter 0\.weight, of no size yet; map an image by the network"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused_by_name(
    build: Callable[[], nn.Module], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sized() -> nn.Module:
        network = build()
        network.num_features = 8  # type: ignore[assignment]  # an attribute, not a layer
        return network

    monkeypatch.setitem(sys.modules, "typed", SimpleNamespace(build=sized))
    with pytest.raises(ConfigError, match=said):
        build_encoder(EncoderConfig("typed:build"), seed=0, views=2)


def test_in_another_number_of_views_a_batch_is_one_population() -> None:
    for norm in (nn.BatchNorm2d, OtherNorm):
        torch.manual_seed(0)
        plain = Net(norm).double()
        plain.drop.p = 0.0
        encoder = adapt(copy.deepcopy(plain), CONFIG, views=2).with_views(1)
        images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(encoder(images), plain(images), **CLOSE)


def test_dropout_is_off_so_that_a_step_can_be_taken_again() -> None:
    encoder = adapt(Net(), CONFIG, views=1)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(encoder(images), encoder(images))


def test_copies_and_modes_reach_the_network_itself() -> None:
    encoder = adapt(Net(), CONFIG, views=2)
    copied = copy.deepcopy(encoder).eval()
    assert (copied.network.training, encoder.network.training) == (False, True)
    with torch.no_grad():
        copied.scale.zero_()
    assert copied(torch.randn(2, 3, 8, 8)).abs().max() == 0
    assert encoder.scale.min() == 1
    assert sum(isinstance(layer, Replacement) for layer in copied.modules()) == 3


def test_a_norm_of_another_kind_cannot_be_shared_among_ranks() -> None:
    class Group:
        """Stands for a process group, which is not reached."""

    with pytest.raises(ConfigError, match="a OtherNorm of the network cannot share its statistics among ranks"):
        synchronize_(adapt(Net(OtherNorm), CONFIG, views=2), Group())


MINE = """
import torch
from torch import nn


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2)
        self.classifier = nn.Linear(6, 5)

    def forward(self, images):
        return self.classifier(self.conv(images).mean((2, 3)))


def build(config, *, seed, views):
    return Flat()


class Map(Flat):
    num_features = 6

    def forward(self, images):
        return self.conv(images)


class Only32(Flat):
    image_size = 32
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the module `mine` importable."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("arch", ["mine:Flat", "mine:build"])
def test_a_network_of_ones_own_needs_no_class_of_ours_and_its_weights_follow_the_seed(arch: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (build_encoder(EncoderConfig(arch), seed=seed, views=2) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(one, Foreign)
    assert one.features == 5
    assert torch.equal(one.conv.weight, same.conv.weight)
    assert not torch.equal(one.conv.weight, other.conv.weight)
    convolution, linear = 6 * 27 * 7 * 7, 6 * 5  # 16 px become 7
    assert one.multiply_adds(px=16) == convolution + linear
    with torch.device("meta"):
        assert build_encoder(EncoderConfig(arch), seed=0, views=2).conv.weight.is_meta


@pytest.mark.usefixtures("mine")
def test_what_a_network_gives_and_takes_is_told_where_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"maps images \[2, 3, 9, 9\] to \[2, 6, 4, 4\]; wanted .* \[2, 6\]: pool"):
        build_encoder(EncoderConfig("mine:Map"), seed=0)(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ConfigError, match=r"takes images of 32 px alone, and these are 9 x 9; give \+crop_px=32"):
        adapt(type("Net32", (Net,), {"image_size": 32})(), CONFIG, views=1)(torch.zeros(2, 3, 9, 9))
    patches = SimpleNamespace(patch_size=(16, 16))
    with pytest.raises(ConfigError, match="patches of 16 px, and these are 40 x 40; give multiples of 16"):
        adapt(type("Net16", (Net,), {"patch_embed": patches})(), CONFIG, views=1)(torch.zeros(2, 3, 40, 40))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_named_in_one_line(
    library: str,
    betons: Betons,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    asked = arguments(betons, tmp_path / "run", "--epochs=1", "--warmup-epochs=0")
    assert main([f"demo+encoder={library}:resnet18", *asked[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastbyol-train: error: encoder {library}:resnet18 needs {library}, which cannot be")
    assert line.endswith(f"pip install 'fastbyol[{library}]'")
    assert not (tmp_path / "run" / "config.json").exists()


def test_settings_of_a_resnet_are_none_of_a_librarys() -> None:
    with pytest.raises(ConfigError, match=r"width 0\.5, stem cifar_stride2 .* give RECIPE\+encoder=timm:resnet18"):
        build_timm(named("demo+arch=timm:resnet18").encoder, seed=0, views=1)


@pytest.mark.usefixtures("mine")
def test_gray_images_are_the_gray_of_rgb(betons: Betons, tmp_path: Path) -> None:
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    luma = torch.tensor(LUMA).view(1, 3, 1, 1) / sum(LUMA)
    encoder = build_encoder(EncoderConfig("resnet8", channels=1, stem="cifar"), seed=0).eval()
    level = torch.rand(2, 1, 9, 9)
    gray = (level - (mean * luma).sum()) / (std * luma).sum()
    torch.testing.assert_close(encoder.take_channels((level - mean) / std), gray)
    torch.testing.assert_close(encoder(gray), encoder((level - mean) / std), rtol=1e-4, atol=1e-5)
    recipe = named("demo+channels=1")
    assert {(view.hue, view.saturation, view.grayscale) for view in recipe.drawn_views} == {(0, 0, 0)}
    assert named("demo").drawn_views == named("demo").views
    out = tmp_path / "run"
    assert main([*arguments(betons, out, "--epochs=1", "--warmup-epochs=0"), "--channels=1"]) == 0
    loaded = load_encoder(out)
    assert loaded.state_dict()["conv1.weight"].shape[1] == 1
    assert loaded(torch.zeros(1, 1, 24, 24)).shape == loaded(torch.zeros(1, 3, 24, 24)).shape


@pytest.mark.usefixtures("mine")
def test_what_is_frozen_stays_as_it_was_drawn() -> None:
    model = BYOL(EncoderConfig("mine:build", frozen="conv classifier.bias"), HeadConfig(hidden=8, out=4), seed=0)
    trained = {name for name, parameter in model.online.encoder.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight"}
    with pytest.raises(ConfigError, match=r"frozen is 'patch_embed', and no parameter .* its first is conv\.weight"):
        BYOL(EncoderConfig("mine:build", frozen="patch_embed"), HeadConfig(hidden=8, out=4), seed=0)


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
def test_a_network_of_ones_own_trains_by_adamw_resumes_and_loads(betons: Betons, tmp_path: Path) -> None:
    recipe = "demo+encoder=mine:build+optimizer=adamw+base_lr=0.002"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ["--epochs=3", "--warmup-epochs=0", f"--val={betons.val}"]
    assert main([recipe, *arguments(betons, whole, *asked)[1:]]) == 0
    process = Fork(tmp_path / "said", recipe, *arguments(betons, cut, *asked)[1:], "--checkpoint-every=0.01s")
    wait_until(lambda: len(read_metrics(RunFolder(cut).metrics)) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not RunFolder(cut).result.exists()
    assert main([recipe, *arguments(betons, cut, *asked)[1:], "--resume"]) == 0
    assert encoders_are_equal(whole, cut)
    assert load_encoder(cut, trust=True).features == 5


def test_encoder_in_a_recipe_leaves_out_the_settings_of_another() -> None:
    recipe = named("demo+encoder=timm:convnext_atto+crop_px=64")
    assert (recipe.encoder, recipe.crop_px) == (EncoderConfig("timm:convnext_atto"), 64)
    assert apply_change(named("demo"), "encoder=resnet18+stem=cifar").encoder == EncoderConfig("resnet18", stem="cifar")
    with pytest.raises(ConfigError, match=r"no encoder 'convnext'; choose one of .*, timm:NAME, torchvision:NAME, or"):
        named("demo+encoder=convnext")
