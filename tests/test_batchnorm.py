"""Laws of per-view batch norm: one forward over [V*B] is V forwards over [B]."""

from __future__ import annotations

import copy

import pytest
import torch

from fastbyol.batchnorm import BatchNorm1d, BatchNorm2d
from tests.tolerances import FLOAT64_ATOL, FLOAT64_RTOL


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 1), (5, 7), (3, 2, 1, 1), (4, 3, 5, 6)], ids=str)
def test_one_forward_equals_a_forward_per_view(views: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    channels = shape[1]
    ours = (BatchNorm1d if len(shape) == 2 else BatchNorm2d)(channels, views=views).double()
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    plain = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(channels).double()
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    offsets = torch.arange(views, dtype=torch.float64).repeat_interleave(shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = (torch.randn(views * shape[0], *shape[1:], dtype=torch.float64) * 2 + 30 * offsets).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    weights = torch.randn_like(x)
    y = ours(x)
    y2 = torch.cat([plain(part) for part in x2.chunk(views)])
    (y * weights).sum().backward()
    (y2 * weights).sum().backward()
    close = {"rtol": FLOAT64_RTOL, "atol": FLOAT64_ATOL}
    torch.testing.assert_close(y, y2, **close)
    torch.testing.assert_close(x.grad, x2.grad, **close)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, **close)
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad, **close)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), **close)


def test_views_are_separate_populations() -> None:
    layer = BatchNorm2d(3, views=2)
    x = torch.randn(8, 3, 4, 4)
    y = layer(x)
    x[4:] += 100
    assert torch.equal(layer(x)[:4], y[:4])


def test_evaluation_uses_running_statistics_and_leaves_them() -> None:
    layer = BatchNorm2d(2)
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(4.0)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 2, 2, 2)  # an odd batch: no views in evaluation
    torch.testing.assert_close(layer(x), (x - 1) / (4 + 1e-5) ** 0.5)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="equal parts"):
        BatchNorm1d(2, views=2)(torch.randn(5, 2))
