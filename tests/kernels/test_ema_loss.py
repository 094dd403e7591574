"""Laws of the fused loss and EMA against the reference in float64, and of the lag of its target."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastbyol.kernels import reference
from fastbyol.kernels.ema_loss import Workspace, ema_loss
from fastbyol.kernels.segments import BLOCK
from fastbyol.optim import LARS
from tests.support.tolerances import FLOAT32_LARS, FLOAT32_LOSS, FLOAT32_LOSS_GRADIENT

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = ((1,), (8, 3, 3, 3), (BLOCK,), (BLOCK + 5,), (7, 9))


def tensors(device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).to(device) for x in drawn]


def projections(device: str, pairs: int = 5, width: int = 300) -> tuple[Tensor, Tensor]:
    q, z = torch.randn(2, 2 * pairs, width, generator=torch.Generator().manual_seed(0)).to(device)
    return q.requires_grad_(), z


@pytest.mark.parametrize("tau", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=["float", "tensor32", "tensor64"])
def test_loss_gradient_and_targets_are_the_references(device: str, tau: float, dtype: torch.dtype | None) -> None:
    (q, z), targets, params = projections(device), tensors(device, 1), tensors(device, 2)
    q_64 = q.detach().double().requires_grad_()
    targets_64 = [x.double() for x in targets]
    before = [x.clone() for x in targets]
    rate = tau if dtype is None else torch.tensor(tau, dtype=dtype, device=device)
    loss = ema_loss(q, z, targets, params, tau=rate)
    loss_64 = reference.ema_loss(q_64, z.double(), targets_64, [x.double() for x in params], tau=tau)
    loss.backward()
    loss_64.backward()
    torch.testing.assert_close(loss.double(), loss_64, rtol=0, atol=FLOAT32_LOSS)
    torch.testing.assert_close(q.grad.double(), q_64.grad, rtol=0, atol=FLOAT32_LOSS_GRADIENT)
    for x, x_64 in zip(targets, targets_64, strict=True):
        torch.testing.assert_close(x.double(), x_64, rtol=0, atol=FLOAT32_LARS)
    if tau in (0.0, 1.0):
        assert all(torch.equal(*pair) for pair in zip(targets, before if tau else params, strict=True))


@pytest.mark.parametrize("is_tensor", [False, True], ids=["float", "tensor64"])
def test_targets_near_tau_one_keep_the_digits_of_one_minus_tau(device: str, is_tensor: bool) -> None:
    """A float32 tau of 0.99999 would move the target by 1.3e-3 of a step too little."""
    p, target = torch.ones(5, device=device), torch.zeros(5, device=device)
    tau = torch.tensor(0.99999, dtype=torch.float64, device=device) if is_tensor else 0.99999
    ema_loss(*projections(device), [target], [p], tau=tau)
    torch.testing.assert_close(target.double(), torch.full_like(target, 1e-5).double(), rtol=1e-6, atol=0)


def test_it_is_one_launch_however_many_targets(device: str, launches: list[str]) -> None:
    (q, z), workspace, tau = projections(device), Workspace(), torch.tensor(0.9, device=device)
    params, targets = ([torch.ones(3, device=device) for _ in range(20)] for _ in range(2))
    losses = [ema_loss(q, z, targets, params, tau=tau, workspace=workspace) for _ in range(3)]
    assert len(launches) == 3
    assert torch.equal(losses[0], losses[2])


def test_workspace_follows_tensors_that_move(device: str) -> None:
    (q, z), workspace = projections(device), Workspace()
    params, targets = tensors(device, 1), tensors(device, 2)
    ema_loss(q, z, targets, params, tau=0.5, workspace=workspace)
    moved, kept, twin = tensors(device, 3), [x.clone() for x in targets], copy.deepcopy(workspace)
    for one in (workspace, twin):
        ema_loss(q, z, [x.zero_() for x in moved], params, tau=0.5, workspace=one)
        assert all(torch.equal(x, p / 2) for x, p in zip(moved, params, strict=True))
    assert all(torch.equal(*pair) for pair in zip(targets, kept, strict=True))


def test_misaligned_targets_are_moved_too(device: str) -> None:
    (q, z), flat = projections(device), torch.zeros(2 * BLOCK + 1, device=device)
    target, p = flat[1:], torch.randn(2 * BLOCK, device=device)
    ema_loss(q, z, [target], [p], tau=0.0)
    assert torch.equal(target, p)
    assert flat[0] == 0


def networks(device: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    online, predictor = nn.Linear(6, 5).to(device), nn.Linear(5, 5).to(device)
    return online, predictor, copy.deepcopy(online).requires_grad_(False)


def test_target_is_the_exact_one_a_step_late(device: str) -> None:
    """After k launches the target is what the exact rule, EMA after each update, made of updates 1 to k-1."""
    online, predictor, target = networks(device)
    lars = LARS([*online.parameters(), *predictor.parameters()], trust=0.1)
    exact = [p.detach().double() for p in online.parameters()]  # never sees the first launch: theta_0 into theta_0
    workspace, generator = Workspace(), torch.Generator().manual_seed(1)
    for k, tau in enumerate((0.5, 0.75, 0.9, 0.25)):
        if k:
            for xi, theta in zip(exact, online.parameters(), strict=True):
                xi.lerp_(theta.detach().double(), 1 - tau)
        images = torch.randn(8, 6, generator=generator).to(device)
        q, z = predictor(online(images)), target(images)
        lars.set_rates(lr=0.5, tau=tau)
        loss = ema_loss(q, z, list(target.parameters()), list(online.parameters()), tau=lars.tau, workspace=workspace)
        for xi, x in zip(exact, target.parameters(), strict=True):
            torch.testing.assert_close(x.double(), xi, rtol=0, atol=FLOAT32_LARS)
        lars.zero_grad()
        loss.backward()
        lars.step()
        assert not torch.equal(target.weight, online.weight)


def test_replayed_graph_follows_tau_and_the_parameters(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    (q, z), workspace = projections(device), Workspace()
    params, targets, tau = tensors(device, 1), tensors(device, 2), torch.tensor(0.5, device=device)
    ema_loss(q, z, targets, params, tau=tau, workspace=workspace)
    targets_64 = [x.double() for x in targets]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ema_loss(q, z, targets, params, tau=tau, workspace=workspace)
    for k in range(3):
        tau.fill_(0.25 * k)
        graph.replay()
        reference.ema_(targets_64, [p.double() for p in params], tau=0.25 * k)
        for x, x_64 in zip(targets, targets_64, strict=True):
            torch.testing.assert_close(x.double(), x_64, rtol=0, atol=FLOAT32_LARS)
        torch.testing.assert_close(loss, reference.byol_loss(q, z), rtol=0, atol=FLOAT32_LOSS)
