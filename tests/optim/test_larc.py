"""Laws of NVIDIA apex: probed piece by piece, never required, and LARS's step where its formula is LARC's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastbyol import optim
from fastbyol.config import OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.optim import LARS, larc

CONFIG = OptimConfig(base_lr=1.0, weight_decay=0.0, tau_base=0.9)  # without decay, LARC's ratio is LARS's


@pytest.mark.parametrize("name", larc.PIECES)
def test_a_missing_piece_says_which_versions_have_it(name: str) -> None:
    if larc.find_installed()[name]:
        pytest.skip(f"apex has {name} here")
    module, builds = larc.PIECES[name]
    with pytest.raises(ConfigError, match=f"{module}.{name} cannot.*NVIDIA apex has it in {builds}"):
        larc.import_piece(name)


@pytest.mark.skipif(not larc.find_installed()["LARC"], reason="NVIDIA apex with LARC is not installed")
def test_larc_without_decay_is_lars() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    theirs = copy.deepcopy(ours)
    our_step, apex_step = optim.build(ours, {}, CONFIG), larc.LARC(theirs, {}, CONFIG)
    for _ in range(3):
        for p, p2 in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            p2.grad = p.grad.clone()
        optimizer: LARS | larc.LARC
        for optimizer in (our_step, apex_step):
            optimizer.set_rates(lr=0.5, tau=1.0)
            optimizer.step()
    for p, p2 in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, p2)
