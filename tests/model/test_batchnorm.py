"""Laws of per-view batch norm: one forward over [V*B] is V forwards over [B], then a residual and ReLU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastbyol.model.batchnorm import BatchNormAct1d, BatchNormAct2d, BatchNormAddReLU2d, recalibrate_
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL


def drawn(kind: type[nn.Module], channels: int, **options: object) -> nn.Module:
    layer = kind(channels, **options).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def check(ours: nn.Module, *inputs: Tensor, relu: bool) -> None:
    """Compare forward, gradients and buffers with torch's batch norm called once a view, a sum and a ReLU."""
    plain = (nn.BatchNorm1d if inputs[0].ndim == 2 else nn.BatchNorm2d)(ours.num_features).double()
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    leaves, leaves2 = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    y = ours(*leaves)
    y2 = sum(leaves2[1:], torch.cat([plain(part) for part in leaves2[0].chunk(ours.views)]))
    y2 = y2.relu() if relu else y2
    twice = (y, y2) if isinstance(y, Tensor) else (y[0] + 2 * y[1], 3 * y2)
    weights = torch.randn_like(y2)
    for result in twice:
        (result * weights).sum().backward()
    close = {"rtol": FLOAT64_RTOL, "atol": FLOAT64_ATOL}
    torch.testing.assert_close(*twice, **close)
    for leaf, leaf2 in zip([*leaves, *ours.parameters()], [*leaves2, *plain.parameters()], strict=True):
        torch.testing.assert_close(leaf.grad, leaf2.grad, **close)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), **close)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 1), (5, 7), (3, 2, 1, 1), (4, 3, 5, 6)], ids=str)
def test_one_forward_equals_a_forward_per_view(views: int, shape: tuple[int, ...], relu: bool) -> None:
    torch.manual_seed(0)
    kind = BatchNormAct1d if len(shape) == 2 else BatchNormAct2d
    offsets = torch.arange(views, dtype=torch.float64).repeat_interleave(shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = torch.randn(views * shape[0], *shape[1:], dtype=torch.float64) * 2 + 30 * offsets
    check(drawn(kind, shape[1], views=views, relu=relu), x, relu=relu)


def test_the_end_of_a_block_adds_the_residual_and_sums_both_gradients() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    check(drawn(BatchNormAddReLU2d, 3, views=2), x, residual, relu=True)


def test_views_are_separate_populations() -> None:
    layer = BatchNormAct2d(3, views=2)
    x = torch.randn(8, 3, 4, 4)
    y = layer(x)
    x[4:] += 100
    assert torch.equal(layer(x)[:4], y[:4])


@pytest.mark.parametrize("kind", [BatchNormAct2d, BatchNormAddReLU2d])
def test_an_overflow_is_forgotten(kind: type[nn.Module]) -> None:
    layer, x = kind(3, views=2), torch.randn(8, 3, 4, 4)
    inputs = (x, x) if kind is BatchNormAddReLU2d else (x,)
    untouched = copy.deepcopy(layer.state_dict())
    spoilt = x.clone()
    spoilt[0, :, 0, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    layer(spoilt, *inputs[1:])
    assert torch.equal(layer.running_mean, untouched["running_mean"])
    assert torch.equal(layer.running_var, untouched["running_var"])
    layer(*inputs)
    assert not torch.isclose(layer.running_mean, untouched["running_mean"]).any()
    z = layer.eval()(*inputs)
    assert all(result.isfinite().all() for result in (z if isinstance(z, tuple) else (z,)))


def test_evaluation_uses_running_statistics_and_leaves_them() -> None:
    layer = BatchNormAct2d(2, views=2, relu=False)
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(4.0)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 2, 2, 2)  # an odd batch: no views in evaluation
    torch.testing.assert_close(layer(x), (x - 1) / (4 + 1e-5) ** 0.5)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="equal size"):
        BatchNormAct1d(2, views=2)(torch.randn(5, 2))


def test_evaluation_of_a_blocks_end_equals_torchs() -> None:
    torch.manual_seed(0)
    layer = drawn(BatchNormAddReLU2d, 3, views=2).eval()
    x, residual = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    z, twin = layer(x, residual)
    plain = nn.BatchNorm2d(3).double().eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(z, (plain(x) + residual).relu())
    assert torch.equal(z, twin)


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="one value per channel"):
        BatchNormAct1d(2, views=2)(torch.randn(2, 2))


def test_recalibrated_statistics_are_about_the_mean_of_the_batches() -> None:
    layer = BatchNormAct2d(3, views=2).double()
    layer.running_mean.fill_(50)
    generator = torch.Generator().manual_seed(0)
    batches = [5 + torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(64)]
    recalibrate_(layer, batches)
    assert not layer.training
    assert layer.momentum == 0.1
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean((0, 2, 3)), rtol=0.01, atol=0)
    torch.testing.assert_close(layer.running_var, torch.cat(batches).var((0, 2, 3)), rtol=0.02, atol=0)
