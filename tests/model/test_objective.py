"""Laws of the objectives, each held to its definition written out here in float64, and to its limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config import ObjectiveConfig
from fastbyol.kernels.byol_loss import byol_loss
from fastbyol.model.objective import Objective, attraction, gather_rows, normalize, repulsion
from tests.support import ranks
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL

IMAGES, D = 5, 7


def pair(*, images: int = IMAGES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, z = torch.randn(2, 2 * images, D, dtype=torch.float64, generator=generator)
    return q, z


def objective_of(**changes: Any) -> Objective:
    return Objective(ObjectiveConfig(**changes), dimensions=D, seed=0).double()


def close(actual: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


def info_nce(q: Tensor, z: Tensor, *, alpha: float, beta: float) -> float:
    """Write eq. 6 of the paper as it stands, for the first view against the second."""
    count = len(q) // 2

    def similarity(i: int, j: int) -> float:
        return F.cosine_similarity(q[i], z[j], dim=0).item()

    total = 0.0
    for i in range(count):
        others = sum(math.exp(similarity(i, j) / alpha) for j in range(count) if j != i)
        others += sum(math.exp(similarity(i, count + j) / alpha) for j in range(count))
        total += 2 * similarity(i, count + i) - beta * 2 * alpha * math.log(others)
    return total / count


def swapped(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_negatives_are_the_papers_info_nce_in_both_directions(beta: float) -> None:
    q, z = pair()
    maximised = info_nce(q, z, alpha=0.2, beta=beta) + info_nce(swapped(q), swapped(z), alpha=0.2, beta=beta)
    for target in ("ema", "online"):
        close(objective_of(beta=beta, temperature=0.2, target=target)(q, z), 4 - maximised)


def test_beta_zero_is_byols_loss_to_the_bit() -> None:
    q, z = (x.float() for x in pair())
    assert torch.equal(objective_of(temperature=0.01)(q, z), byol_loss(q, z))
    close(attraction(*pair()), byol_loss(*pair()))


def test_beta_one_without_predictor_and_target_is_simclr() -> None:
    z, temperature = pair()[0].requires_grad_(), 0.5
    logits = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / temperature
    logits = logits - torch.diag(torch.full((2 * IMAGES,), torch.inf, dtype=torch.float64))
    nt_xent = F.cross_entropy(logits, (torch.arange(2 * IMAGES) + IMAGES) % (2 * IMAGES))
    loss = objective_of(target="online", beta=1.0, temperature=temperature)(z, z)
    close(loss, 4 + 4 * temperature * nt_xent)
    ours, theirs = torch.autograd.grad(loss, z), torch.autograd.grad(4 * temperature * nt_xent, z)
    close(ours[0], theirs[0])


@pytest.mark.parametrize("target", ["ema", "online"])
def test_decoupled_negatives_leave_out_the_images_other_view(target: str) -> None:
    q, z = pair()
    unit_q, unit_z = F.normalize(q, dim=1), F.normalize(z, dim=1)
    total = 0.0
    for row in range(2 * IMAGES):
        others = [i for i in range(2 * IMAGES) if i % IMAGES != row % IMAGES]
        positive = unit_q[row] @ unit_z[(row + IMAGES) % (2 * IMAGES)]
        total += (2 - 2 * positive + 0.6 * (unit_z[others] @ unit_q[row] / 0.3).logsumexp(0)).item()
    close(objective_of(beta=1.0, temperature=0.3, target=target, decoupled=True)(q, z), total / IMAGES)


def test_decoupled_negatives_of_a_queue_are_the_queue_alone() -> None:
    q, z = pair()
    model = objective_of(beta=1.0, temperature=0.3, queue=16, decoupled=True)
    negatives = 0.6 * (F.normalize(q, dim=1) @ model.queue.T / 0.3).logsumexp(1).sum() / IMAGES
    close(model.eval()(q, z), byol_loss(q, z) + negatives)


def test_beta_set_for_a_step_is_the_beta_of_the_loss() -> None:
    q, z = pair()
    fading = objective_of(beta=1.0, fade=0.5)
    for beta in (1.0, 0.3, 0.0):
        fading.set_beta(beta)
        close(fading(q, z), objective_of(beta=beta)(q, z))


def test_beta_one_with_a_queue_is_moco_in_both_directions() -> None:
    q, z = pair()
    model = objective_of(beta=1.0, temperature=0.3, queue=16)
    queue = model.queue.clone()
    losses = []
    unit_q, unit_z = F.normalize(q, dim=1), F.normalize(z, dim=1)
    for queries, keys in ((unit_q[:IMAGES], unit_z[IMAGES:]), (unit_q[IMAGES:], unit_z[:IMAGES])):
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / 0.3
        losses.append(F.cross_entropy(logits, torch.zeros(IMAGES, dtype=torch.int64)))
    close(model(q, z), 4 + 4 * 0.3 * sum(losses) / 2)


def test_the_queue_holds_the_newest_projections_and_only_in_training() -> None:
    model = objective_of(beta=1.0, queue=12)
    before = model.queue.clone()
    q, z = pair(images=4)
    model.eval()(q, z)
    assert torch.equal(model.queue, before)
    model.train()
    for number in range(2):
        model(q, z + number)
    close(model.queue[4:8], F.normalize(z, dim=1)[4:])
    close(torch.cat([model.queue[8:], model.queue[:4]]), F.normalize(z + 1, dim=1))
    assert model.queue_next == 4
    assert {"queue", "queue_next"} <= model.state_dict().keys()


def test_projections_that_are_no_numbers_never_enter_the_queue() -> None:
    model = objective_of(beta=1.0, queue=12)
    before = model.queue.clone()
    q, z = pair(images=4)
    z[2, 3] = torch.nan
    model(q, z)
    assert torch.equal(model.queue, before)


def test_a_queue_can_be_differentiated_through_after_it_has_moved() -> None:
    q, z = pair()
    model = objective_of(beta=1.0, queue=16)
    model(q.requires_grad_(), z).backward()
    assert q.grad.isfinite().all()
    assert z.grad is None


def test_normalizations_are_torchs_divided_by_the_root_of_d() -> None:
    x = pair()[0]
    views = x.chunk(2)
    close(normalize(x, "layernorm"), F.layer_norm(x, [D], eps=0) / math.sqrt(D))
    close(
        normalize(x, "batchnorm"),
        torch.cat([F.batch_norm(view, None, None, training=True, eps=1e-30) for view in views]) / math.sqrt(D),
    )
    close(normalize(x, "l2"), F.normalize(x, dim=1))
    assert torch.equal(normalize(x, "none"), x)


@pytest.mark.parametrize("normalization", ["l2", "layernorm", "batchnorm"])
def test_normalized_rows_have_a_mean_squared_length_of_one_and_no_scale(normalization: str) -> None:
    x = pair()[0]
    rows = normalize(x, normalization)
    close(rows.square().sum(1).mean(), 1.0)
    close(normalize(3 * x, normalization), rows)
    assert normalize(torch.ones_like(x), normalization).isfinite().all()


@pytest.mark.parametrize("normalization", ["layernorm", "batchnorm", "none"])
def test_other_normalizations_sum_both_directions(normalization: str) -> None:
    q, z = pair()
    n, m = normalize(q, normalization), normalize(z, normalization)
    expected = (n[:IMAGES] - m[IMAGES:]).square().sum() + (n[IMAGES:] - m[:IMAGES]).square().sum()
    close(objective_of(normalization=normalization)(q, z), expected / IMAGES)


@pytest.mark.parametrize("normalization", ["l2", "layernorm", "batchnorm", "none"])
def test_gradients_match_finite_differences(normalization: str) -> None:
    q, z = (x.requires_grad_() for x in pair(images=2))
    assert torch.autograd.gradcheck(lambda a, b: attraction(a, b, normalization=normalization), (q, z))


def test_gradient_of_negatives_matches_finite_differences() -> None:
    q, z = (x.requires_grad_() for x in pair(images=2))
    assert torch.autograd.gradcheck(lambda a, b: repulsion(a, b, temperature=0.5), (q, z))


def test_half_precision_is_computed_in_float32_under_autocast() -> None:
    q, z = (x.bfloat16() for x in pair())
    for changes in ({"beta": 1.0}, {"target": "online", "beta": 1.0}, {"normalization": "layernorm"}):
        model = objective_of(**changes)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(q, z)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, model(q.float(), z.float()))


def rank_main(rank: int, folder: Path) -> dict[str, Tensor]:
    """Differentiate this rank's share of a batch with everybody's negatives; let two batches enter a queue."""
    q, z = (x.clone().requires_grad_() for x in torch.load(folder / "inputs.pt")[rank])
    loss = repulsion(q, z, temperature=0.2, group=dist.group.WORLD)
    loss.backward()
    model = objective_of(beta=1.0, queue=16)
    model.group = dist.group.WORLD
    model(q.detach(), z.detach())
    return {"loss": loss.detach(), "dq": q.grad, "dz": z.grad, "queue": model.queue, "next": model.queue_next}


def gradient_main(rank: int, _: Path) -> dict[str, Tensor]:
    """Differentiate through gathered rows; give the gradient that came in, after, and the one that went out."""
    rows = torch.zeros(1, 2, requires_grad=True)
    joined = gather_rows(rows, dist.group.WORLD)
    given = torch.full_like(joined, 1.0 + rank)
    joined.backward(given)
    return {"given": given, "rows": rows.grad}


def test_gathering_leaves_the_gradient_it_is_given_alone(tmp_path: Path) -> None:
    got = ranks.run(gradient_main, tmp_path, ranks=2)
    for rank, tensors in enumerate(got):
        assert tensors["given"].eq(1 + rank).all()
        assert tensors["rows"].eq(3).all()


def test_ranks_share_negatives_as_if_they_were_one_process(tmp_path: Path) -> None:
    q, z = pair(images=6)
    shares = [[torch.cat([view[3 * r : 3 * r + 3] for view in x.chunk(2)]) for x in (q, z)] for r in range(2)]
    torch.save(shares, tmp_path / "inputs.pt")
    got = ranks.run(rank_main, tmp_path, ranks=2)
    q.requires_grad_()
    z.requires_grad_()
    whole = repulsion(q, z, temperature=0.2)
    whole.backward()
    close(sum(rank["loss"] for rank in got) / 2, whole.detach())
    for name, gradient in (("dq", q.grad), ("dz", z.grad)):
        close(ranks.join([rank[name] for rank in got]) / 2, gradient)
    assert torch.equal(got[0]["queue"], got[1]["queue"])
    close(got[0]["queue"][:12], F.normalize(torch.cat([share[1] for share in shares]), dim=1))
    assert got[0]["next"] == 12
