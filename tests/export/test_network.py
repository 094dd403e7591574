"""Laws of a loaded encoder: an ordinary network, torchvision's in both modes, that says what images it wants."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import fastbyol
from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.export import formats, save_encoder
from fastbyol.export.network import ordinary
from fastbyol.model.parts import Encoder, build_encoder
from fastbyol.model.resnet import build
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL

DEPTHS = {"resnet8": (1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
CONFIGS = [
    EncoderConfig("resnet8", width=0.25, stem="cifar"),
    EncoderConfig("resnet18", width=0.125),
    EncoderConfig("resnet50", width=1 / 16, stem="cifar_stride2"),
]
OWN = """
from torch import nn
from fastbyol.model.batchnorm import BatchNormAct2d
from fastbyol.model.parts import Encoder, build_encoder

class Own(Encoder):
    def __init__(self, config):
        super().__init__()
        self.config, self.features = config, 4
        self.conv, self.norm = nn.Conv2d(3, 4, 3), BatchNormAct2d(4, views=2)

    def forward(self, images):
        return self.norm(self.conv(images)).mean((2, 3))

def build(config, *, seed, views):
    return Own(config)
"""


def saved(folder: Path, config: EncoderConfig) -> Path:
    """Write an encoder whose weights and statistics are all drawn, as at the end of a run; return its folder."""
    encoder = build(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.running_var):
                value.uniform_(0.5, 1.5, generator=generator)
            for value in (layer.bias.data, layer.running_mean):
                value.normal_(0.0, 0.1, generator=generator)
    save_encoder(folder / "encoder.safetensors", encoder, config)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Encoder:
    return fastbyol.load_encoder(saved(tmp_path, CONFIGS[0]))


def images(count: int, side: int = 24) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


class Reference(nn.Module):
    """A ResNet by its definition (He et al. 2015), of torch's layers under the names of a state dict."""

    def __init__(self, config: EncoderConfig, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.norms = nn.ModuleDict()
        self.weights = nn.ParameterDict()
        for name, value in state.items():
            if value.ndim == 4:
                self.weights[name.removesuffix(".weight").replace(".", "-")] = value.clone()
            elif name.endswith("running_mean"):
                self.norms[name.removesuffix(".running_mean").replace(".", "-")] = nn.BatchNorm2d(len(value))
        for name, norm in self.norms.items():
            prefix = name.replace("-", ".") + "."
            norm.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def unit(self, x: Tensor, conv: str, norm: str, *, stride: int = 1) -> Tensor:
        weight = self.weights[conv]
        y: Tensor = self.norms[norm](F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2))
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(x, "conv1", "bn1", stride=1 if self.config.stem == "cifar" else 2).relu()
        if self.config.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        for stage, depth in enumerate(DEPTHS[self.config.arch], start=1):
            for n in range(depth):
                at, stride = f"layer{stage}-{n}-", 2 if stage > 1 and n == 0 else 1
                has_three = f"{at}conv3" in self.weights
                y = self.unit(x, f"{at}conv1", f"{at}bn1", stride=1 if has_three else stride).relu()
                y = self.unit(y, f"{at}conv2", f"{at}bn2", stride=stride if has_three else 1)
                if has_three:
                    y = self.unit(y.relu(), f"{at}conv3", f"{at}bn3")
                if f"{at}downsample-0" in self.weights:
                    x = self.unit(x, f"{at}downsample-0", f"{at}downsample-1", stride=stride)
                x = (x + y).relu()
        return x.mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.arch)
def test_it_is_the_resnet_of_the_same_weights(config: EncoderConfig, training: bool, tmp_path: Path) -> None:
    ours = fastbyol.load_encoder(saved(tmp_path, config)).double()
    peer = Reference(config, ours.state_dict()).double().train(training)
    assert not ours.training
    ours.train(training)
    x = images(5, 33).double()  # an odd batch
    y, expected = ours(x), peer(x)
    close = {"rtol": FLOAT64_RTOL, "atol": FLOAT64_ATOL}
    torch.testing.assert_close(y, expected, **close)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    for result in (y, expected):
        (result * weights).sum().backward()
    for name, weight in peer.weights.items():
        torch.testing.assert_close(ours.get_submodule(name.replace("-", ".")).weight.grad, weight.grad, **close)
    for name, norm in peer.norms.items():
        own = ours.get_submodule(name.replace("-", "."))
        torch.testing.assert_close(own.state_dict(), norm.state_dict(), **close)
        for parameter in ("weight", "bias"):
            torch.testing.assert_close(getattr(own, parameter).grad, getattr(norm, parameter).grad, **close)


def test_a_batch_of_any_size_trains(small: Encoder) -> None:
    assert small.train()(images(33)).shape == (33, small.features)


def test_outputs_follow_their_images_through_any_order(small: Encoder) -> None:
    small.double().train()
    x = images(8).double()
    whole = small(x)
    for order in (torch.arange(8).roll(4), torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])):  # halves swapped, and mixed
        torch.testing.assert_close(small(x[order]), whole[order], rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


def by_script(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    return torch.jit.script(encoder)


def by_trace(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(encoder, images(2, 16))


def by_compile(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(encoder, backend="eager", fullgraph=True)


def by_export(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    return torch.export.export(encoder, (images(2, 16),), dynamic_shapes=shapes).module()


def by_pickle(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    return pickle.loads(pickle.dumps(encoder))


def by_torch_save(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CONVERSIONS = [by_script, by_trace, by_compile, by_export, torch.fx.symbolic_trace, by_pickle, by_torch_save]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("convert", [*CONVERSIONS, copy.deepcopy], ids=lambda convert: convert.__name__)
def test_what_takes_any_network_takes_it(
    convert: Callable[[Encoder], Callable[[Tensor], Tensor]], small: Encoder
) -> None:
    converted, x = convert(small), images(5)
    torch.testing.assert_close(converted(x), small(x))


def test_a_compiled_network_trains_in_one_graph(small: Encoder) -> None:
    twin = copy.deepcopy(small).train()
    compiled, x = by_compile(small.train()), images(5)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(small.state_dict(), twin.state_dict())


def test_what_expects_torchs_own_layers_works(small: Encoder) -> None:
    assert parameters_to_vector(small.parameters()).ndim == 1  # wants contiguous weights, as safetensors does
    assert save(small.state_dict())
    x = images(4)
    torch.testing.assert_close(torch.vmap(lambda image: small(image[None])[0])(x), small(x))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(small))
    assert isinstance(synchronized.get_submodule("bn1"), nn.SyncBatchNorm)
    assert type(small.get_submodule("layer1.0.bn2")) is nn.BatchNorm2d


def test_it_is_written_as_the_runs_encoder_is(tmp_path: Path) -> None:
    config = CONFIGS[1]
    encoder = fastbyol.load_encoder(saved(tmp_path, config))
    for kind in ("safetensors", "pth"):
        formats.write(kind, tmp_path / "again" / f"encoder.{kind}", encoder, config, px=32)
    again = fastbyol.load_encoder(tmp_path / "again")
    torch.testing.assert_close(again.state_dict(), encoder.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            images(2).mul(50).byte(),
            r"torch\.uint8 \[2, 3, 24, 24\] .* give \(images / 255\)\.to\(torch\.float32\), norm",
        ),
        (images(2).permute(0, 2, 3, 1), r"\[2, 24, 24, 3\] .* give images\.permute\(0, 3, 1, 2\)$"),
        (images(2)[:, :1], r"\[2, 1, 24, 24\] .* give images\.expand\(-1, 3, -1, -1\)$"),
        (torch.zeros(2, 4, 24, 24), r"give images\[:, :3\]$"),
        (images(2)[0], r"\[3, 24, 24\] .* give images\[None\]$"),
        (images(2)[0].permute(1, 2, 0), r"\[24, 24, 3\] .* give images\.permute\(2, 0, 1\)\[None\]$"),
        (images(2).to("meta"), r"on meta; wanted torch\.float32 \[N, 3, H, W\] on cpu; give images\.to\('cpu'\)$"),
        (images(2).double(), r"torch\.float64 .* give images\.to\(torch\.float32\)$"),
        (images(2)[0, 0], r"\[24, 24\] .* give a batch of RGB images$"),
        (images(2)[None], r"\[1, 2, 3, 24, 24\] .* give a batch of RGB images$"),
        (images(2).numpy(), r"images are a ndarray; wanted a torch\.float32 tensor \[N, 3, H, W\]; .*from_numpy"),
    ],
    ids=[
        "uint8",
        "HWC",
        "gray",
        "RGBA",
        "unbatched",
        "unbatched HWC",
        "device",
        "float64",
        "rank 2",
        "rank 5",
        "numpy",
    ],
)
def test_images_of_another_form_are_answered_in_one_line(given: object, message: str, small: Encoder) -> None:
    for call in (small, small.feature_map, small.train()):
        with pytest.raises(ConfigError, match=message) as caught:
            call(given)
        assert "\n" not in str(caught.value)


def test_what_is_said_to_give_is_taken(small: Encoder) -> None:
    x = images(2)
    pixels = x.mul(50).byte().permute(0, 2, 3, 1)
    with pytest.raises(ConfigError) as caught:
        small(pixels)
    expression = str(caught.value).partition("give ")[2].partition(", normalised")[0]
    assert expression == "(images.permute(0, 3, 1, 2) / 255).to(torch.float32)"
    given = eval(expression, {"torch": torch}, {"images": pixels})
    torch.testing.assert_close(small(given), small(x.mul(50).byte() / 255))


def test_the_check_reads_no_values_and_minds_autocast(small: Encoder) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small(images(2).bfloat16()).shape == small(images(2)).shape
    on_meta = copy.deepcopy(small).to("meta")  # where there are none
    assert on_meta(images(2).to("meta")).is_meta


def test_an_encoder_of_ones_own_takes_a_batch_as_one_population(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_of_test_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = EncoderConfig("own_of_test_network:build")
    save_encoder(tmp_path / "e.safetensors", build_encoder(config, seed=0), config)
    loaded = fastbyol.load_encoder(tmp_path / "e.safetensors", trust=True).train()
    x = images(5)
    expected = F.batch_norm(loaded.conv(x), None, None, loaded.norm.weight, loaded.norm.bias, True).relu().mean((2, 3))
    torch.testing.assert_close(loaded(x), expected)
    assert loaded(images=x).shape == (5, 4)
    with pytest.raises(ConfigError, match=r"give images\[None\]"):
        loaded(x[0])


def test_the_encoder_of_a_loop_of_ones_own_becomes_ordinary() -> None:
    encoder = build(CONFIGS[0], seed=0, views=2)
    plain, before = ordinary(encoder), copy.deepcopy(encoder.state_dict())
    assert plain.training
    assert plain(images(3)).shape == (3, encoder.features)
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)  # a copy has moved


def test_networks_have_one_population_unless_asked() -> None:
    assert build(CONFIGS[0], seed=0)(images(3)).shape[0] == 3
