"""Laws of the networks and the step, held to a naive BYOL written out here in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol import optim, schedule
from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.kernels.reference import byol_loss
from fastbyol.model.batchnorm import BatchNormAddReLU2d
from fastbyol.model.byol import BYOL, embedding_std
from fastbyol.train.step import Eager
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL, NAIVE_STEPS_RTOL

TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)


class Plain(nn.Module):
    """Torch's own batch norm, which knows nothing of views, then the residual sum and ReLU as they are written."""

    def __init__(self, ours: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        kind = nn.BatchNorm1d if isinstance(ours, nn.BatchNorm1d) else nn.BatchNorm2d
        self.norm = kind(ours.num_features).to(ours.weight.dtype)
        self.norm.load_state_dict(ours.state_dict())
        self.adds = isinstance(ours, BatchNormAddReLU2d)
        self.relu = self.adds or ours.relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(x)
        if self.adds:
            x = F.relu(x + residual)
            return x, x
        return F.relu(x) if self.relu else x


def plain_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every per-view batch norm by a plain one."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            module.add_module(name, Plain(child))
        else:
            plain_batch_norm(child)
    return module


def naive_byol(model: BYOL, batches: list[Tensor], steps: int) -> list[float]:
    """Run BYOL as the paper writes it: a forward a view, a loop over parameters, EMA last."""
    online, predictor, target = model.online, model.predictor, model.target
    momenta = {p: torch.zeros_like(p) for p in [*online.parameters(), *predictor.parameters()]}
    losses = []
    for k in range(steps):
        v1, v2 = batches[k].chunk(2)
        q1, q2 = predictor(online(v1)), predictor(online(v2))
        with torch.no_grad():
            z1, z2 = target(v1), target(v2)
        loss = 0.0
        for q, z in ((q1, z2), (q2, z1)):
            loss = loss + (2 - 2 * F.cosine_similarity(q, z, dim=1)).mean()
        for p in momenta:
            p.grad = None
        loss.backward()
        lr = OPTIM.base_lr / 2 * (1 + math.cos(math.pi * k / steps))
        tau = 1 - (1 - OPTIM.tau_base) * (math.cos(math.pi * k / steps) + 1) / 2
        with torch.no_grad():
            for p, u in momenta.items():
                g = p.grad
                if p.ndim > 1:
                    g = g + OPTIM.weight_decay * p
                    g = g * (0.001 * p.norm() / g.norm() if p.norm() > 0 and g.norm() > 0 else 1.0)
                u.copy_(0.9 * u + g)
                p.sub_(lr * u)
            for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
                xi.copy_(tau * xi + (1 - tau) * theta)
        losses.append(loss.item())
    return losses


def test_five_steps_agree_with_a_naive_byol() -> None:
    torch.manual_seed(0)
    steps = 5
    ours = BYOL(TINY, HEAD, seed=1).double()
    naive = plain_batch_norm(copy.deepcopy(ours))
    batches = [torch.randn(12, 3, 16, 16, dtype=torch.float64) for _ in range(steps)]
    engine = Eager(ours, optim.build(ours, ours.target_of(), OPTIM))
    losses = []
    for k in range(steps):
        lr = schedule.learning_rate(k / steps, peak=OPTIM.base_lr, warmup=0.0)
        tau = schedule.ema_rate(k / steps, base=OPTIM.tau_base)
        losses.append(engine(batches[k], lr=lr, tau=tau).loss.item())
    assert losses == pytest.approx(naive_byol(naive, batches, steps), rel=NAIVE_STEPS_RTOL)
    assert losses[0] != pytest.approx(losses[-1])
    for name, value in naive.state_dict().items():
        moved = ours.state_dict()[name.replace(".norm.", ".")]
        torch.testing.assert_close(moved, value, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=name)


def test_loss_is_the_sum_of_both_directions() -> None:
    torch.manual_seed(0)
    q, z = torch.randn(2, 10, 6, dtype=torch.float64)
    expected = sum((2 - 2 * F.cosine_similarity(q[i], z[(i + 5) % 10], dim=0)) for i in range(10)) / 5
    torch.testing.assert_close(byol_loss(q, z), expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


def test_loss_spans_zero_to_eight() -> None:
    q = torch.randn(6, 4)
    z = torch.cat(q.chunk(2)[::-1])
    assert byol_loss(q, z).item() == pytest.approx(0, abs=1e-6)
    assert byol_loss(q, -3 * z).item() == pytest.approx(8)


def test_loss_of_a_zero_row_is_finite_with_a_finite_gradient() -> None:
    q = torch.zeros(4, 3, requires_grad=True)
    loss = byol_loss(q, torch.randn(4, 3))
    loss.backward()
    assert loss.item() == pytest.approx(2)
    assert torch.isfinite(q.grad).all()


def test_loss_gradient_matches_finite_differences() -> None:
    torch.manual_seed(0)
    q = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: byol_loss(x, z), (q,))


def test_loss_of_half_precision_is_computed_in_float32() -> None:
    q, z = torch.randn(2, 8, 64).bfloat16()
    assert byol_loss(q, z).dtype == torch.float32
    torch.testing.assert_close(byol_loss(q, z), byol_loss(q.float(), z.float()))


def test_target_starts_as_a_copy_and_gets_no_gradient() -> None:
    model = BYOL(TINY, HEAD, seed=0)
    for online, target in zip(model.online.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(online, target)
        assert online is not target
    model(torch.randn(8, 3, 16, 16)).loss.backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in [*model.online.parameters(), *model.predictor.parameters()])


def test_target_moves_its_running_statistics_by_its_own_forwards_only() -> None:
    model = BYOL(TINY, HEAD, seed=0)
    optimizer = optim.build(model, model.target_of(), OPTIM)
    with torch.no_grad():
        model.target.encoder.conv1.weight.mul_(3)  # other weights, so other statistics
    Eager(model, optimizer)(torch.randn(8, 3, 16, 16), lr=0.1, tau=1.0)
    online, target = model.online.encoder.bn1, model.target.encoder.bn1
    assert not torch.equal(online.running_mean, target.running_mean)
    torch.testing.assert_close(target.running_mean, 3 * online.running_mean)


def test_tau_one_freezes_the_target_and_tau_zero_copies() -> None:
    for tau in (1.0, 0.0):
        model = BYOL(TINY, HEAD, seed=0)
        optimizer = optim.build(model, model.target_of(), OPTIM)
        before = [p.clone() for p in model.target.parameters()]
        Eager(model, optimizer)(torch.randn(8, 3, 16, 16), lr=0.1, tau=tau)
        expected = before if tau else list(model.online.parameters())
        assert all(torch.equal(p, e) for p, e in zip(model.target.parameters(), expected, strict=True))


def test_embedding_std_tells_health_from_collapse() -> None:
    torch.manual_seed(0)
    assert embedding_std(torch.randn(4000, 64)) == pytest.approx(1 / 8, rel=0.02)
    assert embedding_std(torch.ones(20, 64)) == 0
