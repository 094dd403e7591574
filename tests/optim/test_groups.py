"""Laws of parameter groups: a predictor that learns at a rate of its own, under each optimiser."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.model.byol import BYOL
from fastbyol.model.parts import Optimizer, build_optimizer
from fastbyol.optim import larc, parameter_groups
from tests.support.gradients import set_gradients

CONFIG = OptimConfig(base_lr=1.0, weight_decay=0.1, tau_base=0.9, optimizer="lars")
SCALE = 4.0  # a power of two, by which rates are multiplied exactly
WITHOUT_APEX = pytest.mark.skipif(not larc.find_installed()["LARC"], reason="NVIDIA apex with LARC is not installed")
OURS = ["lars", "sgd", "muon", "adamw"]
NAMES = [*OURS, pytest.param("apex-larc", marks=WITHOUT_APEX)]


class Networks(nn.Module):
    """What a run trains: predictors beside the online network, one of them without a bias or a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.predictor = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.local_predictor = nn.Linear(4, 4, bias=False)


def is_of_predictor(name: str) -> bool:
    return not name.startswith("online.")


def trained(name: str, config: OptimConfig, *, lr: float, steps: int = 3) -> nn.Module:
    """Return networks after steps along gradients that are the same in each call."""
    torch.manual_seed(0)
    networks = Networks()
    optimizer = build_optimizer(name, networks, {}, config)
    for _ in range(steps):
        set_gradients(networks)
        optimizer.set_rates(lr=lr, tau=1.0)
        optimizer.step()
    return networks


def test_each_parameter_is_in_one_group_and_the_predictors_are_in_their_own() -> None:
    networks = Networks()
    groups = parameter_groups(networks, weight_decay=0.1, trust=1e-3, predictor_lr_scale=SCALE)
    assert sum(len(group["params"]) for group in groups) == len(list(networks.parameters()))
    scale_of = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    for name, parameter in networks.named_parameters():
        assert scale_of[parameter] == (SCALE if is_of_predictor(name) else 1.0)
    assert [(group["weight_decay"], group["trust"]) for group in groups] == 2 * [(0.1, 1e-3), (0.0, None)]
    assert len(parameter_groups(networks, weight_decay=0.1, trust=1e-3)) == 2


@pytest.mark.parametrize("depth", [1, 2])
def test_the_predictors_of_a_run_are_found(depth: int) -> None:
    model = BYOL(
        EncoderConfig("resnet18", width=1 / 16, stem="cifar"),
        HeadConfig(hidden=6, out=4, predictor_depth=depth, local_predictor=True),
        seed=0,
    )
    groups = parameter_groups(model, weight_decay=0.1, trust=1e-3, predictor_lr_scale=SCALE)
    scaled = {parameter for group in groups if group["lr_scale"] == SCALE for parameter in group["params"]}
    assert model.local_predictor is not None
    assert scaled == {*model.predictor.parameters(), *model.local_predictor.parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_a_predictor_without_biases_and_norms_learns_too(name: str) -> None:
    networks = nn.ModuleDict({"online": nn.Linear(3, 4), "predictor": nn.Linear(4, 4, bias=False)})
    optimizer = build_optimizer(name, networks, {}, replace(CONFIG, predictor_lr_scale=SCALE))
    before = copy.deepcopy(networks.state_dict())
    take_a_step(networks, optimizer)
    assert not any(torch.equal(value, before[key]) for key, value in networks.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_predictor_learns_at_its_own_rate_and_the_rest_as_without(name: str) -> None:
    usual, faster = trained(name, CONFIG, lr=0.01), trained(name, CONFIG, lr=SCALE * 0.01)
    own = trained(name, replace(CONFIG, predictor_lr_scale=SCALE), lr=0.01)
    for key, parameter in own.named_parameters():
        expected = (faster if is_of_predictor(key) else usual).get_parameter(key)
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
        other = (usual if is_of_predictor(key) else faster).get_parameter(key)
        assert not torch.equal(parameter, other)


@pytest.mark.parametrize("name", OURS)
def test_a_state_saved_before_groups_had_a_scale_goes_on(name: str) -> None:
    torch.manual_seed(0)
    networks = Networks()
    again = copy.deepcopy(networks)
    optimizer, other = (build_optimizer(name, each, {}, CONFIG) for each in (networks, again))
    take_a_step(networks, optimizer)
    again.load_state_dict(networks.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["lr_scale"]
    other.load_state_dict(state)
    take_a_step(networks, optimizer)
    take_a_step(again, other)
    for parameter, twin in zip(networks.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, twin)


@pytest.mark.parametrize("name", OURS)
def test_a_restored_state_and_a_copy_keep_both_rates(name: str) -> None:
    config = replace(CONFIG, predictor_lr_scale=SCALE)
    torch.manual_seed(0)
    networks = Networks()
    optimizer = build_optimizer(name, networks, {}, config)
    take_a_step(networks, optimizer)
    restored = copy.deepcopy(networks)
    resumed = build_optimizer(name, restored, {}, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, copy_of_it = copy.deepcopy((networks, optimizer))
    for each, its in ((networks, optimizer), (restored, resumed), (copied, copy_of_it)):
        torch.manual_seed(2)
        set_gradients(each)
        its.step()  # at the rates of the step before
    for parameter, *twins in zip(*(each.parameters() for each in (networks, restored, copied)), strict=True):
        assert all(torch.equal(parameter, twin) for twin in twins)


def take_a_step(networks: nn.Module, optimizer: Optimizer) -> None:
    torch.manual_seed(1)
    set_gradients(networks)
    optimizer.set_rates(lr=0.01, tau=1.0)
    optimizer.step()
