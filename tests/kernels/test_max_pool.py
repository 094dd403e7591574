"""Laws of the stem's max pooling: values and gradients are torch's, whichever consumers have one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.kernels.max_pool import max_pool

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 8, 8, 8), (3, 65, 6, 9), (2, 64, 16, 16)]


def drawn(shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()  # zeros tie, as after a ReLU
    return x.to(device, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient_of_both_consumers_are_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, launches: list[str]
) -> None:
    x = drawn(shape, device).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = F.max_pool2d(wide, 3, 2, 1)
    first, second = max_pool(x)
    assert torch.equal(first.double(), expected)
    assert torch.equal(second, first)
    assert first.is_contiguous(memory_format=torch.channels_last)
    weights = [drawn(tuple(first.shape), device, seed).round(decimals=1).to(dtype) for seed in (1, 2)]
    (first * weights[0] + second * weights[1]).sum().backward()
    expected.backward(weights[0].double() + weights[1].double())
    assert wide.grad is not None
    assert x.grad is not None
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-22
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=rounding, atol=0)
    assert launches == ["max_pool_kernel", "max_pool_backward_kernel"]


@pytest.mark.parametrize("used", [0, 1])
def test_a_consumer_may_have_no_gradient(used: int, device: str) -> None:
    x = drawn((2, 4, 6, 5), device).requires_grad_()
    max_pool(x)[used].sum().backward()
    wide = x.detach().double().requires_grad_()
    F.max_pool2d(wide, 3, 2, 1).sum().backward()
    assert torch.equal(x.grad.double(), wide.grad)


def test_nan_infinity_and_negatives_pool_as_in_torch(device: str) -> None:
    x = -1 - drawn((1, 4, 7, 7), device)
    x[0, 0, 3, 3], x[0, 1], x[0, 2, 2, 2] = torch.nan, -torch.inf, torch.inf
    x.requires_grad_()
    wide = x.detach().double().cpu().requires_grad_()  # on a GPU, channels-last, torch loses the gradient of -inf
    z, expected = max_pool(x)[0], F.max_pool2d(wide, 3, 2, 1)
    torch.testing.assert_close(z.double().cpu(), expected, rtol=0, atol=0, equal_nan=True)
    z.backward(torch.ones_like(z))
    expected.backward(torch.ones_like(expected))
    assert torch.equal(x.grad.double().cpu(), wide.grad)


def test_without_a_gradient_nothing_but_the_result_is_kept(device: str) -> None:
    x = drawn((2, 8, 6, 6), device)
    with torch.no_grad():
        first, second = max_pool(x.requires_grad_())
    assert not first.requires_grad
    assert first.data_ptr() == second.data_ptr()
