"""Laws of LARS and the EMA target."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastbyol import optim
from fastbyol.config import OptimConfig
from fastbyol.optim import LARS

CONFIG = OptimConfig(base_lr=1.0, weight_decay=0.1, tau_base=0.9)


def one(value: list[float], gradient: list[float], **settings: float | None) -> torch.Tensor:
    parameter = nn.Parameter(torch.tensor(value, dtype=torch.float64))
    parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    LARS([parameter], **settings).step()
    return parameter.detach()


def test_first_step_is_the_formula_by_hand() -> None:
    # p = (3, 4), |p| = 5; g + wd p = (0, 1) + .5 (3, 4) = (1.5, 3), |g| = sqrt(11.25)
    moved = one([3, 4], [0, 1], lr=2.0, weight_decay=0.5, trust=0.001)
    ratio = 0.001 * 5 / 11.25**0.5
    torch.testing.assert_close(moved, torch.tensor([3 - 2 * ratio * 1.5, 4 - 2 * ratio * 3], dtype=torch.float64))


@pytest.mark.parametrize(("value", "gradient"), [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0])])
def test_ratio_is_one_where_a_norm_is_zero(value: list[float], gradient: list[float]) -> None:
    expected = torch.tensor(value, dtype=torch.float64) - torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(one(value, gradient, lr=1.0), expected)


def test_learning_rate_stays_outside_the_momentum() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    lars = LARS([parameter], trust=None, momentum=0.5)
    parameter.grad = torch.tensor([1.0])
    lars.set_rates(lr=0.0, tau=1.0)
    lars.step()
    assert parameter.item() == 1.0
    lars.set_rates(lr=1.0, tau=1.0)
    lars.step()
    assert parameter.item() == 1.0 - 1.5  # the first gradient arrives through the momentum at the new rate


def test_biases_and_batch_norm_neither_decay_nor_adapt() -> None:
    layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = optim.build(layer, {}, CONFIG)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(layer)
    optimizer.set_rates(lr=0.25, tau=1.0)
    optimizer.step()
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(layer.get_parameter(name), before.get_parameter(name) - 0.25)
    assert not torch.equal(layer.get_parameter("0.weight"), before.get_parameter("0.weight") - 0.25)


def test_target_follows_the_updated_parameter() -> None:
    parameter, target = nn.Parameter(torch.tensor([4.0])), torch.tensor([0.0])
    parameter.grad = torch.tensor([2.0])
    LARS([parameter], lr=1.0, trust=None, tau=0.75, target_of={parameter: target}).step()
    assert parameter.item() == 2.0
    assert target.item() == 0.25 * 2.0


def test_state_restores_bit_for_bit() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    optimizer = optim.build(layer, {}, CONFIG)

    def step(module: nn.Module, lars: LARS, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        lars.set_rates(lr=0.5, tau=1.0)
        lars.step()

    step(layer, optimizer, 1)
    twin = copy.deepcopy(layer)
    restored = optim.build(twin, {}, CONFIG)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(layer, optimizer, 2)
    step(twin, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))


def test_a_missing_gradient_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        LARS([nn.Parameter(torch.ones(2))]).step()
