"""Laws of the losses without negatives and target, each held to its paper's formula written out here in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol import optim
from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig, OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.model.byol import BYOL
from fastbyol.model.decorrelation import agreement, coding_rate
from fastbyol.model.parts import build_objective
from fastbyol.recipe import EAGER, LOSS_SETTINGS
from fastbyol.recipes import named
from fastbyol.train import step
from fastbyol.train.memory import step_bytes
from tests.support import ranks
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL, NAIVE_STEPS_RTOL

IMAGES, D = 6, 5
LOSSES = ("vicreg", "coding-rate")
TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8, predictor_depth=0)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)


def projections(*, images: int = IMAGES, dimensions: int = D, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return scale * torch.randn(2 * images, dimensions, dtype=torch.float64, generator=generator)


def loss_of(name: str, **settings: Any) -> nn.Module:
    return build_objective(ObjectiveConfig(loss=name, target="online", **settings), dimensions=D, seed=0)


def model_of(name: str) -> BYOL:
    return BYOL(TINY, HEAD, seed=1, objective=ObjectiveConfig(loss=name, target="online")).double()


def images_of_step() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=generator)


def close(actual: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


def variance_term(view: Tensor) -> float:
    """Write eq. 1 and 2 of the VICReg paper as they stand."""
    lacking = [max(0.0, 1 - math.sqrt(column.var(correction=1).item() + 1e-4)) for column in view.T]
    return sum(lacking) / len(lacking)


def covariance_term(view: Tensor) -> float:
    """Write eq. 3 and 4 of the VICReg paper as they stand."""
    count, dimensions = view.shape
    covariance = sum(torch.outer(row - view.mean(0), row - view.mean(0)) for row in view) / (count - 1)
    pairs = [(i, j) for i in range(dimensions) for j in range(dimensions) if i != j]
    return sum(covariance[i, j].item() ** 2 for i, j in pairs) / dimensions


def rate_term(view: Tensor, distortion: float) -> float:
    """Write eq. 1 of the EMP-SSL paper as it stands, by eigenvalues; distortion is its epsilon squared."""
    count, dimensions = view.shape
    units = view / view.norm(dim=1, keepdim=True)
    second_moments = sum(torch.outer(row, row) for row in units)
    values = torch.linalg.eigvalsh(
        torch.eye(dimensions, dtype=torch.float64) + dimensions / count / distortion * second_moments
    )
    return sum(math.log(value) for value in values.tolist()) / 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_vicreg_is_the_papers_with_the_scales_of_its_authors_code(scale: float) -> None:
    z = projections(scale=scale)
    a, b = z.chunk(2)
    distance = sum((one - other).square().sum().item() for one, other in zip(a, b, strict=True)) / IMAGES  # eq. 5
    variance = variance_term(a) + variance_term(b)
    covariance = covariance_term(a) + covariance_term(b)
    close(loss_of("vicreg")(z, z), 25 * distance / D + 25 * variance / 2 + covariance)
    weighted = loss_of("vicreg", invariance=2.0, variance=3.0, covariance=5.0)(z, z)
    close(weighted, 2 * distance / D + 3 * variance / 2 + 5 * covariance)


@pytest.mark.parametrize(("images", "dimensions"), [(9, 4), (4, 9), (5, 5)])
def test_coding_rate_is_the_papers_for_fewer_images_and_for_fewer_dimensions(images: int, dimensions: int) -> None:
    z = projections(images=images, dimensions=dimensions)
    a, b = z.chunk(2)
    rate = (rate_term(a, 0.3) + rate_term(b, 0.3)) / 2
    close(coding_rate(z, distortion=0.3), rate)
    middle = (F.normalize(a, dim=1) + F.normalize(b, dim=1)) / 2
    cosines = [F.cosine_similarity(view, middle, dim=1).mean() for view in (a, b)]
    close(agreement(z), sum(cosines) / 2)
    close(loss_of("coding-rate", similarity=7.0, distortion=0.3)(z, z), 7 * (1 - sum(cosines) / 2) - rate)


def test_views_that_agree_and_fill_all_directions_have_no_loss_left() -> None:
    view = math.sqrt(5 / 2) * torch.cat([torch.eye(3), -torch.eye(3)]).double()  # variance 1, covariance 0
    close(loss_of("vicreg")(view.repeat(2, 1), view.repeat(2, 1)), 0.0)
    close(coding_rate(view.repeat(2, 1), distortion=0.2), 1.5 * math.log(1 + 1 / 0.2))  # the most of unit rows
    close(agreement(view.repeat(2, 1)), 1.0)


def test_collapsed_projections_cost_the_whole_variance_and_code_nothing() -> None:
    z = torch.ones(2 * IMAGES, D, dtype=torch.float64)
    close(loss_of("vicreg")(z, z), 25 * (1 - 0.01))
    close(coding_rate(z, distortion=0.2), math.log(1 + D / 0.2) / 2)  # one direction alone
    z = z.requires_grad_()
    assert torch.autograd.grad(loss_of("vicreg")(z, z), z)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("images", [2, 7])  # fewer and more than dimensions
def test_gradients_match_finite_differences(name: str, images: int) -> None:
    z = projections(images=images).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: loss_of(name)(rows, rows), (z,))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32_under_autocast(name: str) -> None:
    z = projections().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(name)(z, z)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(name)(z.float(), z.float()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_projections_that_are_no_numbers_reach_loss_and_gradient(name: str, bad: float) -> None:
    z = projections().float()
    z[2, 3] = bad
    z.requires_grad_()
    loss = loss_of(name)(z, z)
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, z)[0].isfinite().all()


def rank_main(rank: int, folder: Path) -> dict[str, Tensor]:
    """Differentiate this rank's share of projections by both losses."""
    found: dict[str, Tensor] = {}
    for name in LOSSES:
        z = torch.load(folder / "inputs.pt")[rank].requires_grad_()
        objective = loss_of(name)
        objective.group = dist.group.WORLD  # type: ignore[assignment]
        loss = objective(z, z)
        loss.backward()
        found |= {f"{name} loss": loss.detach(), f"{name} dz": z.grad}
        model = model_of(name)
        model.synchronize_(dist.group.WORLD)
        model(torch.cat([view.chunk(2)[rank] for view in images_of_step().chunk(2)])).loss.backward()
        found |= {f"{name} {parameter}": p.grad for parameter, p in model.named_parameters()}
    return found


def test_ranks_see_the_projections_of_all_as_one_process_does(tmp_path: Path) -> None:
    z = projections()
    torch.save([torch.cat([view[3 * r : 3 * r + 3] for view in z.chunk(2)]) for r in range(2)], tmp_path / "inputs.pt")
    got = ranks.run(rank_main, tmp_path, ranks=2)
    for name in LOSSES:
        whole = z.clone().requires_grad_()
        loss = loss_of(name)(whole, whole)
        loss.backward()
        close(sum(rank[f"{name} loss"] for rank in got) / 2, loss.detach())
        close(ranks.join([rank[f"{name} dz"] for rank in got]) / 2, whole.grad)
        model = model_of(name)
        model(images_of_step()).loss.backward()
        for parameter, p in model.named_parameters():
            mean = sum(rank[f"{name} {parameter}"] for rank in got) / 2
            torch.testing.assert_close(mean, p.grad, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=parameter)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_lowers_the_loss_of_the_same_images(name: str) -> None:
    model = model_of(name)
    assert model.target is None
    engine = step.Eager(model, optim.build(model, model.target_of(), OPTIM))
    losses = [engine(images_of_step(), lr=1e-2, tau=1.0).loss.item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_memory_of_a_step_is_predicted_as_simclrs(name: str) -> None:
    found, simclrs = (
        step_bytes(named(f"demo+target=online+predictor_depth=0+{change}"), images=64, precision="float32")
        for change in (f"loss={name}", "beta=1")
    )
    assert found == pytest.approx(simclrs, rel=0.1)


def test_what_a_cuda_graph_cannot_hold_is_refused_with_a_remedy() -> None:
    model = model_of("coding-rate")
    with pytest.raises(ConfigError, match="loss CodingRate, which a CUDA graph cannot hold; give --engine eager"):
        step.engine("graph", model, optim.build(model, {}, OPTIM))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("loss=vicreg", "target is ema; give target online and predictor_depth 0"),
        ("loss=vicreg+target=stop-gradient+predictor_depth=0", "target is stop-gradient; give target online"),
        ("loss=coding-rate+target=online", "has nothing to predict; give predictor_depth 0"),
        (
            "loss=vicreg+target=online+predictor_depth=0+beta=1+queue=512",
            r"does not read beta=1.0\+queue=512, which is of loss byol; give beta=0.0\+queue=0, or loss=byol",
        ),
        (
            "loss=coding-rate+target=online+predictor_depth=0+temperature=0.2",
            "does not read temperature=0.2.*give temperature=0.1",
        ),
        ("loss=vicreg+target=online+predictor_depth=0+normalization=none", "give normalization=l2"),
        ("loss=vicreg+target=online+predictor_depth=0+distortion=0.5", "distortion=0.5, which is of loss coding-rate"),
        ("loss=vicreg+target=online+predictor_depth=0+lagged_target=true", "or neither --lagged-target"),
        ("loss=vicreg+target=online+predictor_depth=0+target_statistics=running", "nor --target-statistics running"),
        (
            "variance=1",
            "loss byol does not read variance=1.0, which is of loss vicreg; give variance=25.0, or loss=vicreg",
        ),
        ("loss=vicreg+target=online+predictor_depth=0+variance=-1", "variance is -1.0; give a number from 0"),
        ("loss=vicreg+target=online+predictor_depth=0+invariance=nan", "invariance is nan; give a number from 0"),
        ("loss=coding-rate+target=online+predictor_depth=0+distortion=0", "distortion is 0.0; give a number above 0"),
    ],
)
def test_a_setting_that_is_not_the_losss_is_refused_with_a_remedy(change: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        named(f"demo+{change}")


def test_a_loss_of_ones_own_may_read_all_settings() -> None:
    assert named("demo+loss=mine:Loss+variance=2+temperature=0.3").objective.variance == 2


def test_losses_that_no_cuda_graph_holds_are_those_that_begin_eagerly() -> None:
    for loss in LOSS_SETTINGS:
        module = build_objective(ObjectiveConfig(loss=loss, target="online"), dimensions=8, seed=0)
        assert getattr(module, "is_capturable", True) == (loss not in EAGER)
