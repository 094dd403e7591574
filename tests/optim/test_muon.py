"""Laws of Muon with the EMA target: orthogonal steps, norms that stay, a bad step that changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastbyol.config import OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.optim import muon
from fastbyol.optim.muon import Muon, orthogonal
from tests.support.gradients import copy_gradients, set_gradients
from tests.support.tolerances import FLOAT32_ORTHOGONAL

MOMENTUM = 0.8
CONFIG = OptimConfig(base_lr=0.1, weight_decay=0.3, tau_base=0.9, momentum=MOMENTUM)


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


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5), (32, 288)])
@pytest.mark.parametrize("scale", [1e-38, 1e-24, 1.0, 1e30])
def test_singular_values_become_one_and_the_singular_vectors_stay(shape: tuple[int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    u, _, v = torch.linalg.svd(torch.randn(2, *shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -2.5, min(shape))
    found = orthogonal(scale * (u * values) @ v)
    along = u.mT @ found @ v.mT
    found_values = along.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(along, torch.diag_embed(found_values), rtol=0, atol=FLOAT32_ORTHOGONAL)
    assert found_values.min() > 0.68 - FLOAT32_ORTHOGONAL
    assert found_values.max() < 1.21


@pytest.mark.parametrize("shape", [(1, 5), (8, 8), (16, 300)])
def test_the_factor_is_what_the_iteration_multiplies_by(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x /= torch.linalg.matrix_norm(x, keepdim=True)
    torch.testing.assert_close(muon._factor(x @ x.mT) @ x, muon._iterated(x), rtol=0, atol=1e-12)


def test_bfloat16_is_iterated_as_it_is() -> None:
    x = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(x.bfloat16()).float(), orthogonal(x), rtol=0, atol=0.02)


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
                turned = (now - old).norm() / old.norm()  # less what of the step was along the weight
                assert 0.01 < turned < 0.02 * (1 + FLOAT32_ORTHOGONAL)


def test_a_step_is_the_nesterov_momentum_made_orthogonal() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    optimizer.set_rates(lr=0.05, tau=1.0)
    weight = weight_of(module, 1)
    momentum = torch.zeros_like(weight)
    for _ in range(3):
        set_gradients(module)
        assert weight.grad is not None
        momentum = MOMENTUM * momentum + weight.grad
        ahead = orthogonal((weight.grad + MOMENTUM * momentum).reshape(1, 8, -1)).reshape(weight.shape)
        moved = weight - 0.05 * weight.norm() * ahead / ahead.norm()
        expected = moved * weight.norm() / moved.norm()
        optimizer.step()
        torch.testing.assert_close(weight, expected)


def test_biases_and_norms_learn_by_torchs_sgd() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    twins = copy.deepcopy([p for p in module.parameters() if p.ndim == 1])
    peer = torch.optim.SGD(twins, lr=0.1, momentum=MOMENTUM, nesterov=True)  # ten times the rate
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


def test_a_tau_near_1_is_exact() -> None:
    module = network()
    optimizer, targets = with_targets(module)
    before = copy.deepcopy(targets)
    optimizer.set_rates(lr=0.1, tau=1 - 1e-9)
    set_gradients(module)
    optimizer.step()
    for parameter, target, old in zip(*(m.parameters() for m in (module, targets, before)), strict=True):
        torch.testing.assert_close(target, torch.lerp(old, parameter, 1e-9), rtol=0, atol=0)


def test_a_gradient_of_zeros_moves_no_weight_and_a_momentum_that_fades_stays_harmless() -> None:
    large = nn.Linear(512, 4096)  # its norm times the rate is above 4
    optimizer, _ = with_targets(large)
    optimizer.set_rates(lr=0.2, tau=1.0)
    before = copy.deepcopy(large.state_dict())
    large.weight.grad, large.bias.grad = torch.zeros_like(large.weight), torch.zeros_like(large.bias)
    optimizer.step()
    torch.testing.assert_close(large.state_dict(), before)
    module = network()
    optimizer, _ = with_targets(module)
    optimizer.set_rates(lr=0.1, tau=1.0)
    set_gradients(module)
    for _ in range(500):  # 0.8**500 is below the least float32
        optimizer.step()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_a_closure_gives_its_loss_and_has_gradients() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    optimizer.set_rates(lr=0.1, tau=1.0)

    def loss() -> float:
        total = sum((parameter**2).sum() for parameter in module.parameters())
        assert isinstance(total, torch.Tensor)
        total.backward()  # type: ignore[no-untyped-call]
        return 3.0

    assert optimizer.step(loss) == 3.0
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", ["0.weight", "5.bias"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_with_inf_or_nan_changes_nothing_but_the_count(poison: float, name: str) -> None:
    module = network()
    optimizer, targets = with_targets(module)
    optimizer.set_rates(lr=0.1, tau=0.5)
    set_gradients(module)
    optimizer.step()
    before = copy.deepcopy((module.state_dict(), targets.state_dict(), optimizer.state_dict()["state"]))
    set_gradients(module)
    gradient = module.get_parameter(name).grad
    assert gradient is not None
    gradient[(-1,) * gradient.ndim] = poison
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
    again = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    other, _ = with_targets(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.set_rates(lr=0.1, tau=0.5)
    assert all(other.state[p]["momentum"].stride() == p.stride() for p in again.parameters())
    set_gradients(module)
    copy_gradients(module, again)
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))


def test_a_copy_goes_on_bit_equal_and_what_is_frozen_stays() -> None:
    module = network()
    weight_of(module, 1).requires_grad_(False)
    optimizer, _ = with_targets(module)
    optimizer.set_rates(lr=0.1, tau=0.5)
    frozen = weight_of(module, 1).clone()
    set_gradients(module)
    optimizer.step()
    again, other = copy.deepcopy((module, optimizer))
    set_gradients(module)
    copy_gradients(module, again)
    for each in (optimizer, other):
        each.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))
    assert torch.equal(weight_of(module, 1), frozen)
    assert Muon.is_capturable
    assert Muon.skips_bad_steps


def test_a_weight_of_zeros_is_refused_and_a_missing_gradient_is_told() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    with pytest.raises(RuntimeError, match="has no gradient"):
        optimizer.step()
    nn.init.zeros_(weight_of(module, 4))
    with pytest.raises(ConfigError, match=r"keeps the norm of each weight.*\(24, 8\).*give optimizer lars or adamw"):
        with_targets(module)


def test_a_weight_loaded_as_zeros_stays_zeros() -> None:
    module = network()
    optimizer, _ = with_targets(module)
    nn.init.zeros_(weight_of(module, 4))
    optimizer.set_rates(lr=0.1, tau=1.0)
    set_gradients(module)
    optimizer.step()
    assert not weight_of(module, 4).any()
