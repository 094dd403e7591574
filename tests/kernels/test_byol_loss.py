"""Laws of the loss kernel against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbyol.kernels import reference
from fastbyol.kernels.byol_loss import NUM_WARPS, byol_loss, byol_loss_kernel, launch_arguments
from tests.support.tolerances import BF16_ULP, FLOAT32_LOSS, FLOAT32_LOSS_GRADIENT

pytestmark = pytest.mark.usefixtures("poisoned")
UPSTREAM = 4.0


def expected(q: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and UPSTREAM times its gradient, by autograd in float64."""
    q = q.detach().double().requires_grad_()
    loss = reference.byol_loss(q, z.double())
    (UPSTREAM * loss).backward()
    return loss.detach(), q.grad


def computed(q: Tensor, z: Tensor, ticket: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q = q.detach().requires_grad_()
    loss = byol_loss(q, z, ticket=ticket)
    assert loss.dtype == torch.float32
    (UPSTREAM * loss).backward()
    assert q.grad.dtype == q.dtype
    return loss.detach(), q.grad


def check(q: Tensor, z: Tensor) -> None:
    (loss, dq), (loss_64, dq_64) = computed(q, z), expected(q, z)
    torch.testing.assert_close(loss.double(), loss_64, rtol=0, atol=FLOAT32_LOSS)
    unit = q.double().norm(dim=1, keepdim=True) * len(q) / 4
    rtol = FLOAT32_LOSS_GRADIENT if q.dtype == torch.float32 else BF16_ULP
    torch.testing.assert_close(dq * unit, dq_64 * unit, rtol=rtol, atol=UPSTREAM * FLOAT32_LOSS_GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("pairs", "width"), [(1, 1), (1, 7), (3, 64), (5, 300), (2, 2500)])
def test_loss_and_gradient_are_the_references(device: str, dtype: torch.dtype, pairs: int, width: int) -> None:
    torch.manual_seed(0)
    q, z = torch.randn(2, 2 * pairs, width, device=device).to(dtype)
    check(q, z)


def test_projections_may_differ_in_dtype_and_lie_apart(device: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 40, device=device)
    check(wide[:, 3:30], torch.randn(6, 27, device=device).bfloat16())  # rows apart
    check(wide[:, ::3], torch.randn(14, 6, device=device).t())  # elements apart


def test_zero_rows_have_the_references_loss_and_gradient(device: str) -> None:
    torch.manual_seed(0)
    q, z = torch.randn(2, 6, 9, device=device)
    q[1], z[2] = 0, 0
    (loss, dq), (loss_64, dq_64) = computed(q, z), expected(q, z)
    torch.testing.assert_close(loss.double(), loss_64, rtol=0, atol=FLOAT32_LOSS)
    torch.testing.assert_close(dq.double(), dq_64, rtol=FLOAT32_LOSS_GRADIENT, atol=FLOAT32_LOSS_GRADIENT)
    assert dq[1].abs().max() > 1e5  # the clamp's 1e6, not zero and not inf


def test_tiny_rows_have_the_references_loss_and_gradient(device: str) -> None:
    torch.manual_seed(0)
    q, z = torch.nn.functional.normalize(torch.randn(2, 8, 9, device=device), dim=2)
    lengths = torch.tensor([1.1e-6, 0.9e-6, 3e-7, 1e-8], device=device)  # the clamp acts below 1e-6
    q[1:5] *= lengths[:, None]
    z[3:7] *= lengths[:, None]
    (loss, dq), (loss_64, dq_64) = computed(q, z), expected(q, z)
    torch.testing.assert_close(loss.double(), loss_64, rtol=0, atol=FLOAT32_LOSS)
    unit = q.double().norm(dim=1, keepdim=True).clamp_min(1e-6) * len(q) / 4
    torch.testing.assert_close(dq * unit, dq_64 * unit, rtol=0, atol=UPSTREAM * FLOAT32_LOSS_GRADIENT)


def test_a_value_that_is_no_number_reaches_loss_and_gradient(device: str) -> None:
    q, z = torch.ones(2, 4, 5, device=device)
    q[2, 3] = torch.nan
    loss, dq = computed(q, z)
    assert loss.isnan()
    assert dq[2].isnan().all()


def test_gradient_of_float16_survives_until_the_loss_scale(device: str) -> None:
    torch.manual_seed(0)
    q, z = (100 * torch.randn(2, 64, 256, device=device)).half()
    q.requires_grad_()
    (byol_loss(q, z) * 2**16).backward()
    wide = q.detach().double().requires_grad_()
    (reference.byol_loss(wide, z.double()) * 2**16).backward()
    torch.testing.assert_close(q.grad.double(), wide.grad, rtol=2**-10, atol=FLOAT32_LOSS)


def test_partial_losses_of_many_programs_are_all_added(device: str) -> None:
    torch.manual_seed(0)
    q, z = torch.randn(2, 10, 8, device=device)
    launch = launch_arguments(q, z, ticket=None, tile=8, chunk=4)  # ten programs of a row, three chunks
    byol_loss_kernel[(launch["programs"],)](**launch, num_warps=NUM_WARPS)
    assert launch["programs"] == 10
    torch.testing.assert_close(launch["loss_ptr"].double(), expected(q, z)[0], rtol=0, atol=FLOAT32_LOSS)


def test_a_kept_ticket_serves_every_launch_and_saves_clearing_it(device: str, launches: list[str]) -> None:
    torch.manual_seed(0)
    q, z = torch.randn(2, 14, 300, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    losses = [computed(q, z, ticket)[0] for _ in range(3)]
    assert len(launches) == 3
    assert ticket.item() == 0
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_target_projections_get_no_gradient(device: str) -> None:
    q, z = torch.randn(2, 4, 8, device=device).requires_grad_().unbind()
    q.retain_grad()
    z.retain_grad()
    byol_loss(q, z).backward()
    assert q.grad is not None
    assert z.grad is None


@pytest.mark.parametrize(("q", "z"), [((3, 4), (3, 4)), ((4, 4), (4, 5)), ((4,), (4,))])
def test_what_is_no_pair_of_projections_is_refused(device: str, q: tuple[int, ...], z: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="view after view"):
        byol_loss(torch.ones(q, device=device), torch.ones(z, device=device))


def test_replayed_graph_computes_the_loss_anew(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    torch.manual_seed(0)
    q, z = torch.randn(2, 1024, 256, device=device)
    byol_loss(q, z)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = byol_loss(q, z)
    for _ in range(3):
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.testing.assert_close(loss.double(), reference.byol_loss(q.double(), z.double()), rtol=0, atol=1e-5)
