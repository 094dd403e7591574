"""Laws of LARS and the EMA target."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastbyol import optim
from fastbyol.config import OptimConfig
from fastbyol.kernels.reference import byol_loss, ema_, ema_loss
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


def test_sgd_is_torchs_and_moves_the_targets() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    theirs, targets = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizer = optim.build_sgd(ours, dict(zip(ours.parameters(), targets.parameters(), strict=True)), CONFIG)
    weights, others = [theirs[0].weight], [theirs[0].bias, *theirs[1].parameters()]
    sgd = torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": others}], lr=0.5, momentum=0.9)
    optimizer.set_rates(lr=0.5, tau=0.75)
    for _ in range(3):
        for p, p2 in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            p2.grad = p.grad.clone()
        before = copy.deepcopy(targets)
        optimizer.step()
        sgd.step()
        for p, p2, target, old in zip(*(m.parameters() for m in (ours, theirs, targets, before)), strict=True):
            torch.testing.assert_close(p, p2)
            torch.testing.assert_close(target, 0.75 * old + 0.25 * p)


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


def two_groups() -> tuple[list[nn.Parameter], LARS]:
    params = [nn.Parameter(torch.tensor(value)) for value in ([1.0, 2.0], [3.0])]
    targets = [torch.tensor(value) for value in ([0.0, 0.0], [0.0])]
    groups = [{"params": params[:1]}, {"params": params[1:], "trust": None}, {"params": []}]
    return params, LARS(groups, lr=1.0, tau=0.5, target_of=dict(zip(params, targets, strict=True)))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 1])
def test_one_bad_gradient_skips_the_whole_step_and_is_counted(bad: float, where: int) -> None:
    params, lars = two_groups()
    for p in params:
        p.grad = torch.ones_like(p)
    lars.step()
    tensors = [*params, *lars.target_of.values(), *(state["momentum"] for state in lars.state.values())]
    before = [x.detach().clone() for x in tensors]
    params[where].grad[0] = bad
    lars.step()
    lars.step()
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    assert lars.skipped.tolist() == [2, 2]
    params[where].grad[0] = 1.0
    lars.step()
    assert not any(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    assert lars.skipped.tolist() == [2, 0]


def test_a_copy_keeps_its_targets_and_leaves_the_originals() -> None:
    params, lars = two_groups()
    twin = copy.deepcopy(lars)
    assert len(twin.target_of) == 2
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    twin.step()
    assert all(target.any() for target in twin.target_of.values())
    assert not any(target.any() for target in lars.target_of.values())
    assert params[1].item() == 3.0


def test_tau_is_a_scalar_that_set_rates_moves() -> None:
    _, lars = two_groups()
    assert lars.tau.item() == 0.5
    lars.set_rates(lr=0.1, tau=0.25)
    assert lars.tau.item() == 0.25


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_ema_takes_a_number_or_a_scalar_tensor(tau: float) -> None:
    torch.manual_seed(0)
    theta, xi = torch.randn(2, 9, dtype=torch.float64)
    for rate in (tau, torch.tensor(tau, dtype=torch.float64)):
        target = xi.clone()
        ema_([target], [theta], tau=rate)
        torch.testing.assert_close(target, tau * xi + (1 - tau) * theta)


def test_lagged_targets_move_with_the_loss() -> None:
    torch.manual_seed(0)
    q, z = torch.randn(2, 6, 4)
    target, p = torch.zeros(3), nn.Parameter(torch.ones(3))
    assert torch.equal(ema_loss(q, z, [target], [p], tau=0.75), byol_loss(q, z))
    assert torch.equal(target, torch.full((3,), 0.25))
