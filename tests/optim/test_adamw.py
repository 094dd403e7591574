"""Laws of AdamW with the EMA target: torch's own numbers, a target that follows, a bad step that changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastbyol.config import OptimConfig
from fastbyol.optim import parameter_groups
from fastbyol.optim.adamw import AdamW
from tests.support.gradients import copy_gradients, set_gradients

CONFIG = OptimConfig(base_lr=1e-3, weight_decay=0.1, tau_base=0.9)


class Tokens(nn.Module):
    """A network with every kind of parameter that does not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 3, 4))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer_scale = nn.Parameter(torch.randn(4, 1, 1))
        self.gamma = nn.Parameter(torch.randn(4))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(4, 4, 3, groups=4)
        self.linear = nn.Linear(4, 1)


def with_targets(network: nn.Module) -> tuple[AdamW, nn.Module]:
    targets = copy.deepcopy(network)
    return AdamW(network, dict(zip(network.parameters(), targets.parameters(), strict=True)), CONFIG), targets


def test_weights_decay_and_norms_positions_tokens_and_layer_scale_do_not() -> None:
    network = Tokens()
    names = {parameter: name for name, parameter in network.named_parameters()}
    weights, others = parameter_groups(network, weight_decay=0.1, trust=1e-3)
    assert {names[p] for p in weights["params"]} == {"conv.weight", "linear.weight"}
    assert len(others["params"]) == len(names) - 2
    assert (weights["weight_decay"], others["weight_decay"], others["trust"]) == (0.1, 0.0, None)


def test_steps_are_torchs_and_the_targets_follow() -> None:
    torch.manual_seed(0)
    network = Tokens().to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(network)
    optimizer, targets = with_targets(network)
    weights, others = ([p for p in theirs.parameters() if (p.ndim in (2, 4)) == flag] for flag in (True, False))
    others += [p for p in weights if p.shape == (9, 2)]
    weights = [p for p in weights if p.shape != (9, 2)]
    peer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}], lr=0.01)
    optimizer.set_rates(lr=0.01, tau=0.75)
    for _ in range(3):
        set_gradients(network)
        for parameter, twin in zip(network.parameters(), theirs.parameters(), strict=True):
            assert parameter.grad is not None
            twin.grad = parameter.grad.clone()
        before = copy.deepcopy(targets)
        optimizer.step()
        peer.step()
        for each in zip(*(m.parameters() for m in (network, theirs, targets, before)), strict=True):
            parameter, twin, target, old = each
            torch.testing.assert_close(parameter, twin)
            torch.testing.assert_close(target, 0.75 * old + 0.25 * parameter)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_with_inf_or_nan_changes_nothing_but_the_count(poison: float) -> None:
    torch.manual_seed(0)
    network = Tokens()
    optimizer, targets = with_targets(network)
    optimizer.set_rates(lr=0.01, tau=0.5)
    set_gradients(network)
    optimizer.step()
    before = copy.deepcopy((network.state_dict(), targets.state_dict(), optimizer.state_dict()["state"]))
    set_gradients(network)
    assert network.conv.weight.grad is not None
    network.conv.weight.grad[0, 0, 1, 1] = poison
    optimizer.step()
    after = (network.state_dict(), targets.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.skipped.tolist() == [1, 1]
    set_gradients(network)
    optimizer.step()
    assert optimizer.skipped.tolist() == [1, 0]


def test_a_restored_state_goes_on_bit_equal() -> None:
    torch.manual_seed(0)
    network = Tokens().to(memory_format=torch.channels_last)
    optimizer, targets = with_targets(network)
    optimizer.set_rates(lr=0.01, tau=0.5)
    set_gradients(network)
    optimizer.step()
    again = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    other, _ = with_targets(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.set_rates(lr=0.01, tau=0.5)
    set_gradients(network)
    copy_gradients(network, again)
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))
    assert all(torch.isfinite(target).all() for target in targets.parameters())


def test_a_state_of_another_device_does_not_bring_its_way_of_computing() -> None:
    optimizer, _ = with_targets(Tokens())
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["capturable"] = True  # as a GPU saved it
    optimizer.load_state_dict(state)
    assert not any(group["capturable"] for group in optimizer.param_groups)


def test_a_copy_goes_on_bit_equal() -> None:
    torch.manual_seed(0)
    network = Tokens()
    optimizer, _ = with_targets(network)
    optimizer.set_rates(lr=0.01, tau=0.5)
    again, other = copy.deepcopy((network, optimizer))
    set_gradients(network)
    copy_gradients(network, again)
    for each in (optimizer, other):
        each.step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(optimizer.targets, other.targets, strict=True))
