"""Laws of SAME padding: the sums and maxima of its definition, the usual padding where both agree, exports of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.evaluate.segmentation import dilate_
from fastbyol.export import formats, load_encoder, save_encoder
from fastbyol.model.batchnorm import BatchNormAct2d
from fastbyol.model.padding import SameConv2d, SameMaxPool2d, padded_convolution
from fastbyol.model.resnet import STEMS, build
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL

CLOSE = {"rtol": FLOAT64_RTOL, "atol": FLOAT64_ATOL}
SIDES = [(1, 1), (2, 3), (7, 8), (9, 6)]


def first_pixels(side: int, kernel: int, stride: int) -> list[int]:
    """List where the windows of SAME begin, from its definition."""
    count = -(-side // stride)
    total = max((count - 1) * stride + kernel - side, 0)
    return [stride * i - total // 2 for i in range(count)]


def windows(x: Tensor, kernel: int, stride: int, outside: float, *, dilation: int = 1) -> Tensor:
    """Cut the windows [N, C, rows, columns, kernel, kernel] out of x one pixel at a time."""
    span = dilation * (kernel - 1) + 1
    rows, columns = (first_pixels(side, span, stride) for side in x.shape[2:])
    cut = x.new_full((*x.shape[:2], len(rows), len(columns), kernel, kernel), outside)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            for a in range(kernel):
                for b in range(kernel):
                    h, w = top + a * dilation, left + b * dilation
                    if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]:
                        cut[:, :, i, j, a, b] = x[:, :, h, w]
    return cut


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 2, 1), (3, 2, 1), (3, 1, 1), (3, 1, 4), (3, 2, 2)])
def test_a_convolution_sums_the_windows_of_its_definition(
    sides: tuple[int, int], kernel: int, stride: int, dilation: int
) -> None:
    layer = SameConv2d(3, 4, kernel, stride).double()
    layer.dilation = (dilation, dilation)
    x = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    twin = x.detach().requires_grad_()
    found = layer(x)
    expected = torch.einsum("nchwab,ocab->nohw", windows(twin, kernel, stride, 0.0, dilation=dilation), layer.weight)
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, **CLOSE)


@pytest.mark.parametrize("sides", SIDES)
def test_pooling_takes_the_maxima_of_its_definition(sides: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *sides, dtype=torch.float64).relu()
    expected = windows(x, 3, 2, -torch.inf).amax((4, 5))
    torch.testing.assert_close(SameMaxPool2d()(x), expected, rtol=0, atol=0)


def test_both_paddings_agree_on_odd_sides_and_only_there() -> None:
    same, symmetric = (
        build(EncoderConfig("resnet18", 0.25, padding=padding), seed=0) for padding in ("same", "symmetric")
    )
    same.load_state_dict(symmetric.state_dict())
    odd, even = torch.randn(2, 3, 65, 33), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(same.eval()(odd), symmetric.eval()(odd), rtol=1e-4, atol=1e-6)
        assert (same(even) - symmetric(even)).abs().max() > 0.01
        assert same.feature_map(even).shape == symmetric.feature_map(even).shape
    assert same.multiply_adds(px=64) == symmetric.multiply_adds(px=64)


def test_layers_of_stride_1_are_torchs_own() -> None:
    assert type(padded_convolution(3, 4, 3, 1, padding="same")) is torch.nn.Conv2d
    assert type(padded_convolution(3, 4, 1, 2, padding="same")) is torch.nn.Conv2d
    assert type(padded_convolution(3, 4, 3, 2, padding="symmetric")) is torch.nn.Conv2d


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", ["resnet8", "resnet50"])
def test_a_loaded_encoder_of_either_stem_equals_the_trained_one(arch: str, stem: str, tmp_path: Path) -> None:
    config = EncoderConfig(arch, 0.125, stem, padding="same")
    encoder = build(config, seed=0)
    encoder(torch.randn(4, 3, 32, 32))
    encoder.eval()
    save_encoder(tmp_path / "encoder.safetensors", encoder, config)
    loaded, images = load_encoder(tmp_path), torch.randn(2, 3, 40, 42)
    with torch.inference_mode():
        expected = encoder(images)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(loaded)(images), expected, rtol=1e-4, atol=1e-5)


def test_a_dilated_encoder_keeps_its_padding() -> None:
    encoder = build(EncoderConfig("resnet18", 0.125, padding="same"), seed=0).eval()
    dilate_(encoder, 16)
    assert encoder.feature_map(torch.randn(1, 3, 64, 65)).shape[2:] == (4, 5)


def test_what_has_no_such_padding_refuses_it(tmp_path: Path) -> None:
    config = EncoderConfig("resnet18", padding="same")
    encoder = build(config, seed=0).eval()
    with pytest.raises(ConfigError, match="padding same for images of 3 channels; timm only has"):
        formats.write("timm", tmp_path / "e.pth", encoder, config, px=64)
    with pytest.raises(ConfigError, match="padding is 'valid'; give one of symmetric, same"):
        EncoderConfig(padding="valid")


def test_the_norm_before_the_pool_sees_no_padding() -> None:
    encoder = build(EncoderConfig("resnet18", 0.125, padding="same"), seed=0)
    norm = encoder.bn1
    assert isinstance(norm, BatchNormAct2d)
    x = torch.randn(2, 8, 6, 6) + 5
    encoder.maxpool(x, norm)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
