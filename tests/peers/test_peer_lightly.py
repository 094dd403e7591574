"""Laws of BYOL's pieces where ours and lightly's are defined alike, in float64."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch

from fastbyol import schedule
from fastbyol.kernels import reference
from fastbyol.model.decorrelation import agreement, coding_rate, vicreg
from tests.support.tolerances import FLOAT64

pytestmark = pytest.mark.peers


@pytest.fixture
def lightly(torchvision: ModuleType) -> ModuleType:  # noqa: ARG001  # lightly imports it
    """Import lightly."""
    return pytest.importorskip("lightly")


def test_loss_is_four_plus_twice_lightlys_over_both_directions(lightly: ModuleType) -> None:
    assert lightly
    from lightly.loss import NegativeCosineSimilarity  # noqa: PLC0415

    q, z = torch.randn(2, 14, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    criterion = NegativeCosineSimilarity()
    (q1, q2), (z1, z2) = q.chunk(2), z.chunk(2)
    theirs = 4 + 2 * (criterion(q1, z2) + criterion(q2, z1))
    assert (reference.byol_loss(q, z) - theirs).abs() < 8 * FLOAT64


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.996, 1.0])
def test_ema_is_lightlys(lightly: ModuleType, tau: float) -> None:
    assert lightly
    from lightly.models.utils import update_momentum  # noqa: PLC0415

    torch.manual_seed(0)
    online, theirs = torch.nn.Linear(7, 5).double(), torch.nn.Linear(7, 5).double()
    ours = copy.deepcopy(theirs)
    reference.ema_([p.data for p in ours.parameters()], [p.data for p in online.parameters()], tau=tau)
    update_momentum(online, theirs, tau)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < FLOAT64


def test_tau_follows_lightlys_schedule(lightly: ModuleType) -> None:
    assert lightly
    from lightly.utils.scheduler import cosine_schedule  # noqa: PLC0415

    for step in range(101):
        theirs = cosine_schedule(step, 101, 0.996, 1.0)
        assert abs(schedule.ema_rate(step / 100, base=0.996) - theirs) < FLOAT64


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_vicreg_is_lightlys(lightly: ModuleType, scale: float) -> None:
    assert lightly
    from lightly.loss import VICRegLoss  # noqa: PLC0415

    z = scale * torch.randn(24, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = vicreg(z, invariance=25.0, variance=25.0, covariance=1.0)
    assert (ours - VICRegLoss()(*z.chunk(2))).abs() < 1e3 * FLOAT64  # sums of squares with weights of 25


def test_coding_rate_and_agreement_are_lightlys(lightly: ModuleType) -> None:
    assert lightly
    from lightly.loss.emp_ssl_loss import invariance_loss, tcr_loss  # noqa: PLC0415

    z = torch.randn(24, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    units = torch.nn.functional.normalize(z, dim=1).unflatten(0, (2, -1))  # lightly leaves that to the network
    assert (coding_rate(z, distortion=0.2) - tcr_loss(units, eps=0.2)).abs() < 1e3 * FLOAT64
    assert (agreement(z) + invariance_loss(units)).abs() < 8 * FLOAT64
