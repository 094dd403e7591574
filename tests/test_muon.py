"""Laws of Muon with the EMA target: orthogonal steps, norms that stay, a bad step that changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastbyol.config import OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.muon import VECTOR_RATE, Muon, orthogonal

CONFIG = OptimConfig(base_lr=0.1, weight_decay=0.3, tau_base=0.9)


def network() -> nn.Sequential:
    """Build a network with weights of one shape and of others, tall and wide, biases and a norm; channels-last."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, bias=False)
    layers = nn.Sequential(*convolutions, nn.BatchNorm2d(8), nn.Linear(8, 24), nn.Linear(24, 5))
    for layer in convolutions:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return layers


def weight_of(module: nn.Sequential, number: int) -> nn.Parameter:
    return module.get_parameter(f"{number}.weight")


def with_targets(module: nn.Module) -> tuple[Muon, nn.Module]:
    targets = copy.deepcopy(module)
    return Muon(module, dict(zip(module.parameters(), targets.parameters(), strict=True)), CONFIG), targets


def set_gradients(module: nn.Module, *, scale: float = 1.0) -> None:
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn_like(parameter)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5), (32, 288)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_singular_values_become_one_and_the_singular_vectors_stay(shape: tuple[int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    u, _, v = torch.linalg.svd(torch.randn(2, *shape, generator=generator), full_matrices=False)
    values = torch.linspace(1, 0.05, min(shape))
    found = orthogonal(scale * (u * values) @ v)
    along = u.mT @ found @ v.mT
    torch.testing.assert_close(along, torch.diag_embed(along.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)
    assert 0.65 < along.diagonal(dim1=1, dim2=2).min() <= along.diagonal(dim1=1, dim2=2).max() < 1.25


def test_zeros_stay_zeros() -> None:
    assert not orthogonal(torch.zeros(1, 3, 4)).any()


def test_a_step_turns_each_weight_by_the_rate_and_keeps_its_norm() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    optimizer.set_rates(lr=0.02, tau=1.0)
    for scale in (1.0, 1e-4, 1e3):  # of the gradient, on which the length of a step does not depend
        before = copy.deepcopy(module)
        set_gradients(module, scale=scale)
        optimizer.step()
        for now, old in zip(module.parameters(), before.parameters(), strict=True):
            if now.ndim > 1:
                torch.testing.assert_close(now.norm(), old.norm())
                # the part of the step along the weight is taken back by the norm: at most the whole rate remains
                assert 0.01 < (now - old).norm() / old.norm() < 0.0201


def test_a_step_is_the_nesterov_momentum_made_orthogonal() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    optimizer.set_rates(lr=0.05, tau=1.0)
    weight = weight_of(module, 1)
    momentum = torch.zeros_like(weight)
    for _ in range(3):
        set_gradients(module)
        assert weight.grad is not None
        momentum = 0.9 * momentum + weight.grad
        ahead = orthogonal((weight.grad + 0.9 * momentum).reshape(1, 8, -1)).reshape(weight.shape)
        moved = weight - 0.05 * weight.norm() * ahead / ahead.norm()
        expected = moved * weight.norm() / moved.norm()
        optimizer.step()
        torch.testing.assert_close(weight, expected)


def test_biases_and_norms_learn_by_torchs_sgd() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    twins = copy.deepcopy([p for p in module.parameters() if p.ndim == 1])
    peer = torch.optim.SGD(twins, lr=0.01 * VECTOR_RATE, momentum=0.9, nesterov=True)
    optimizer.set_rates(lr=0.01, tau=1.0)
    for _ in range(3):
        set_gradients(module)
        vectors = [p for p in module.parameters() if p.ndim == 1]
        for vector, twin in zip(vectors, twins, strict=True):
            assert vector.grad is not None
            twin.grad = vector.grad.clone()
        optimizer.step()
        peer.step()
        torch.testing.assert_close([*vectors], [*twins])


def test_the_targets_follow_and_a_rate_of_0_moves_no_parameter() -> None:
    module = network()
    optimizer, targets = with_targets(module)
    optimizer.set_rates(lr=0.1, tau=0.75)
    for _ in range(2):
        before = copy.deepcopy(targets)
        set_gradients(module)
        optimizer.step()
        for parameter, target, old in zip(*(m.parameters() for m in (module, targets, before)), strict=True):
            torch.testing.assert_close(target, 0.75 * old + 0.25 * parameter)
    still = copy.deepcopy(module.state_dict())
    optimizer.set_rates(lr=0.0, tau=1.0)
    set_gradients(module)
    optimizer.step()
    torch.testing.assert_close(module.state_dict(), still, rtol=0, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_with_inf_or_nan_changes_nothing_but_the_count(poison: float) -> None:
    module = network()
    optimizer, targets = with_targets(module)
    optimizer.set_rates(lr=0.1, tau=0.5)
    set_gradients(module)
    optimizer.step()
    before = copy.deepcopy((module.state_dict(), targets.state_dict(), optimizer.state_dict()["state"]))
    set_gradients(module)
    gradient = weight_of(module, 0).grad
    assert gradient is not None
    gradient[0, 0, 1, 1] = poison
    optimizer.step()
    after = (module.state_dict(), targets.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.skipped.tolist() == [1, 1]
    set_gradients(module)
    optimizer.step()
    assert optimizer.skipped.tolist() == [1, 0]


def test_a_restored_state_goes_on_bit_equal() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    optimizer.set_rates(lr=0.1, tau=0.5)
    set_gradients(module)
    optimizer.step()
    again = copy.deepcopy(module)
    other, _ = with_targets(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.set_rates(lr=0.1, tau=0.5)
    set_gradients(module)
    for parameter, twin in zip(module.parameters(), again.parameters(), strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad.clone()
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))


def test_a_weight_of_zeros_is_refused_and_a_missing_gradient_is_told() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    with pytest.raises(RuntimeError, match="has no gradient"):
        optimizer.step()
    nn.init.zeros_(weight_of(module, 4))
    with pytest.raises(ConfigError, match=r"keeps the norm of each weight.*\(24, 8\).*give optimizer lars or adamw"):
        with_targets(module)
