"""Laws of batch norm with pooling: values are those of batch norm, then pooling; gradients are the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbyol.kernels import reference
from fastbyol.kernels.batchnorm import batch_norm_act, batch_norm_eval
from fastbyol.kernels.batchnorm_pool import batch_norm_relu_pool, batch_norm_relu_pool_eval
from fastbyol.kernels.max_pool import max_pool
from fastbyol.kernels.reference import NormParams
from tests.support.tolerances import FLOAT32_BATCHNORM, HALF_ULPS

pytestmark = pytest.mark.usefixtures("poisoned", "short_splits")
SHAPES = [(4, 3, 5, 7), (2, 8, 8, 8), (2, 65, 6, 9), (4, 64, 16, 16), (6, 1, 1, 3)]


def drawn(*shape: int, device: str, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def params(channels: int, device: str, *, dtype: torch.dtype = torch.float32, views: int = 2) -> NormParams:
    weight, bias = drawn(channels, device=device, seed=1).to(dtype), drawn(channels, device=device, seed=2).to(dtype)
    moved = torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)
    batches = torch.zeros((), dtype=torch.int64, device=device)
    leaves = weight.requires_grad_(), bias.requires_grad_()
    return NormParams(*leaves, *moved, batches, views=views, momentum=0.1, eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_batch_norm_then_pooling(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, launches: list[str]
) -> None:
    x = drawn(*shape, device=device).to(dtype)
    fused, apart = params(shape[1], device), params(shape[1], device)
    first, second = batch_norm_relu_pool(x, fused)
    assert launches == ["stats_kernel", "finalize_kernel", "norm_pool_kernel"]
    assert torch.equal(first, max_pool(batch_norm_act(x, apart, relu=True))[0])
    assert torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(fused[2:5], apart[2:5], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_in_evaluation_are_those_of_batch_norm_then_pooling(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, launches: list[str]
) -> None:
    x, norm = drawn(*shape, device=device).to(dtype), params(shape[1], device)
    norm.running_mean.add_(drawn(shape[1], device=device, seed=3))
    norm.running_var.add_(drawn(shape[1], device=device, seed=4).abs())
    with torch.no_grad():
        first, second = batch_norm_relu_pool_eval(x, norm)
        assert launches == ["norm_pool_kernel"]
        expected = max_pool(batch_norm_eval(x, None, norm, relu=True))[0]
    rtol = HALF_ULPS.get(dtype, FLOAT32_BATCHNORM)  # the reciprocal of the std is torch's here, Triton's there
    torch.testing.assert_close(first, expected, rtol=rtol, atol=FLOAT32_BATCHNORM)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("shape", "views", "used"),
    [
        *((shape, 2, (0, 1)) for shape in SHAPES),
        *((SHAPES[0], views, used) for views in (1, 2) for used in ((0,), (1,))),
    ],
    ids=str,
)
def test_gradients_are_the_references(shape: tuple[int, ...], views: int, used: tuple[int, ...], device: str) -> None:
    x = drawn(*shape, device=device)
    results = []
    for dtype in (torch.float32, torch.float64):  # the reference alone computes in float64
        norm, given = params(shape[1], device, dtype=dtype, views=views), x.detach().to(dtype).requires_grad_()
        twins = batch_norm_relu_pool(given, norm)
        weights = [drawn(*twins[0].shape, device=device, seed=3 + i).to(dtype) for i in range(2)]
        sum((twins[i] * weights[i]).sum() for i in used).backward()  # type: ignore[union-attr]
        results.append([given.grad, norm.weight.grad, norm.bias.grad])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        scale = expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5 * scale)


def test_gradients_in_bfloat16_are_those_of_the_kernels_apart(device: str) -> None:
    x = drawn(4, 64, 14, 14, device=device).bfloat16()
    gradients = []
    for pool in (batch_norm_relu_pool, lambda x, norm: max_pool(batch_norm_act(x, norm, relu=True))):
        norm, given = params(64, device), x.detach().requires_grad_()
        first, second = pool(given, norm)
        weights = [drawn(*first.shape, device=device, seed=3 + i).bfloat16() for i in range(2)]
        torch.autograd.backward((first, second), tuple(weights))
        gradients.append((given.grad, norm.weight.grad, norm.bias.grad))
    for found, expected in zip(*gradients, strict=True):
        assert found is not None
        assert (found - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of the inf put in
def test_nan_and_infinity_pool_as_apart(device: str) -> None:
    x = drawn(2, 4, 7, 7, device=device)
    x[0, 0, 3, 3], x[1, 1, 0, 0], x[0, 2, 2, 2] = torch.nan, -torch.inf, torch.inf
    found = batch_norm_relu_pool(x, params(4, device))[0]
    expected = max_pool(batch_norm_act(x, params(4, device), relu=True))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_without_a_gradient_nothing_but_the_result_is_kept(device: str) -> None:
    norm = params(8, device)
    with torch.no_grad():
        first, second = batch_norm_relu_pool(drawn(2, 8, 6, 6, device=device), norm)
    assert not first.requires_grad
    assert first.data_ptr() == second.data_ptr()


def test_it_is_the_references_composition_where_no_kernel_runs(device: str) -> None:
    x, norm = drawn(2, 3, 6, 6, device=device).double(), params(3, device, dtype=torch.float64)
    expected = reference.max_pool(reference.batch_norm_act(x, params(3, device, dtype=torch.float64), relu=True))[0]
    assert torch.equal(batch_norm_relu_pool(x, norm)[0], expected)
