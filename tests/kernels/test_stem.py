"""Laws of the stem's convolution: it is torch's, whatever the sides, and its weight's gradient too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.kernels.stem import fold, stem_convolution
from fastbyol.model.resnet import StemConv2d

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(2, 3, 16, 16), (1, 3, 17, 12), (2, 3, 1, 1), (1, 1, 9, 9), (2, 4, 8, 10), (1, 3, 6, 300)]


def drawn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_the_weights_gradient_are_conv2ds(shape: tuple[int, ...], device: str, launches: list[str]) -> None:
    images = drawn(*shape, device=device).contiguous(memory_format=torch.channels_last)
    weight = drawn(5, shape[1], 7, 7, device=device, seed=1).requires_grad_()
    wide = weight.detach().double().requires_grad_()
    expected = F.conv2d(images.double(), wide, stride=2, padding=3)
    result = stem_convolution(images, weight)
    assert launches == ["fold_kernel"]
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * expected.detach().abs().max().item())
    gradient = drawn(*result.shape, device=device, seed=2)
    result.backward(gradient)
    expected.backward(gradient.double())
    assert weight.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=0, atol=1e-5 * wide.grad.abs().max().item())


def test_images_in_any_memory_format_fold_alike(device: str) -> None:
    images = drawn(2, 3, 10, 14, device=device)
    folded = [fold(x, dtype=torch.bfloat16) for x in (images, images.contiguous(memory_format=torch.channels_last))]
    assert torch.equal(*folded)
    assert folded[0].shape == (2, 64, 8, 7)
    assert folded[0].is_contiguous(memory_format=torch.channels_last)
    assert not folded[0][:, 48:].any()
    assert not folded[0][:, :, :2].any()


def test_images_that_need_a_gradient_get_it(device: str, launches: list[str]) -> None:
    images = drawn(1, 3, 8, 8, device=device).requires_grad_()
    stem = StemConv2d(4).to(device)
    stem(images).sum().backward()
    assert images.grad is not None
    assert launches == []


def test_the_convolution_computes_in_autocasts_precision(device: str) -> None:
    images, stem = drawn(2, 3, 8, 8, device=device), StemConv2d(4).to(device)
    with torch.autocast(device, torch.bfloat16):
        result = stem(images)
    assert result.dtype == torch.bfloat16
    expected = F.conv2d(images.double(), stem.weight.double(), stride=2, padding=3)
    torch.testing.assert_close(result.double(), expected, rtol=2**-6, atol=2**-6)


def test_folding_again_changes_no_bit(device: str, launches: list[str]) -> None:
    images, gradients = drawn(2, 3, 12, 12, device=device), []
    for recomputes in (False, True):
        weight = drawn(5, 3, 7, 7, device=device, seed=1).requires_grad_()
        stem_convolution(images, weight, recomputes=recomputes).square().sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]
    assert launches == 3 * ["fold_kernel"]
