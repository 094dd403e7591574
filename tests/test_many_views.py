"""Laws of more than two views of an image, held to the loss written out here view by view in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol import views
from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig
from fastbyol.kernels.byol_loss import byol_loss
from fastbyol.model.batchnorm import set_views_
from fastbyol.model.byol import BYOL, embedding_std
from fastbyol.model.objective import Objective, attraction, mean_of_others
from fastbyol.recipes import named
from tests.support import ranks
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL, NAIVE_STEPS_RTOL

TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
COUNTS = [3, 4]
IMAGES = 5


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=0)


def written_out(q: Tensor, z: Tensor, count: int) -> Tensor:
    """Compare each view's prediction with the mean of the other views' projections, image by image."""
    images, total = len(q) // count, torch.zeros((), dtype=q.dtype)
    for view in range(count):
        for image in range(images):
            others = [unit(z[other * images + image]) for other in range(count) if other != view]
            difference = unit(q[view * images + image]) - sum(others) / (count - 1)
            total = total + difference @ difference
    return 2 * total / (count * images)


def pair(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, z = torch.randn(2, count * IMAGES, 7, dtype=torch.float64, generator=generator)
    return q, z


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


@pytest.mark.parametrize("count", [2, *COUNTS])
@pytest.mark.parametrize("target", ["ema", "online"])
def test_a_prediction_is_compared_with_the_mean_of_the_other_views(count: int, target: str) -> None:
    q, z = (x.requires_grad_() for x in pair(count))
    objective = Objective(ObjectiveConfig(target=target), dimensions=7, seed=0).double()
    set_views_(objective, count)
    loss, expected = objective(q, z if target == "online" else z.detach()), written_out(q, z, count)
    close(loss, expected)
    wanted = [q, z] if target == "online" else [q]
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("count", COUNTS)
def test_the_gradient_is_the_mean_of_the_losses_of_all_pairs(count: int) -> None:
    q, z = pair(count)
    q.requires_grad_()
    each = list(zip(q.chunk(count), z.chunk(count), strict=True))
    pairs = [
        byol_loss(torch.cat(one[:1] + other[:1]), torch.cat(one[1:] + other[1:])) for one in each for other in each
    ]
    (mean,) = torch.autograd.grad((sum(pairs) - sum(pairs[:: count + 1])) / (count * (count - 1)), q)
    (ours,) = torch.autograd.grad(attraction(q, z, views=count), q)
    close(ours, mean)


def test_of_two_views_the_mean_of_the_others_is_the_other_to_the_bit() -> None:
    rows = torch.randn(10, 3)
    assert torch.equal(mean_of_others(rows, views=2), torch.cat(rows.chunk(2)[::-1]))


@pytest.mark.parametrize("count", COUNTS)
def test_the_loss_spans_zero_to_eight(count: int) -> None:
    z = torch.randn(IMAGES, 4).repeat(count, 1)
    assert attraction(3 * z, z, views=count).item() == pytest.approx(0, abs=1e-6)
    assert attraction(-z, z, views=count).item() == pytest.approx(8)


@pytest.mark.parametrize("normalization", ["layernorm", "batchnorm", "none"])
def test_gradients_of_other_normalizations_match_finite_differences(normalization: str) -> None:
    q, z = (x[:6].requires_grad_() for x in pair(3))
    assert torch.autograd.gradcheck(lambda a, b: attraction(a, b, views=3, normalization=normalization), (q, z))


def model_of(count: int) -> BYOL:
    return BYOL(TINY, HEAD, seed=1, views=count).double()


def batch(count: int, images: int = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count * images, 3, 16, 16, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("count", COUNTS)
def test_each_view_is_a_population_and_a_forward_of_its_own(count: int) -> None:
    model = model_of(count)
    plain = copy.deepcopy(model)
    set_views_(plain, 1)
    each = batch(count).chunk(count)
    z = torch.cat([plain.target(view) for view in each])
    expected = written_out(torch.cat([plain.predictor(plain.online(view)) for view in each]), z.detach(), count)
    output = model(batch(count))
    torch.testing.assert_close(output.loss, expected, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)
    close(output.target_projections, z)
    assert len(output.representations) == IMAGES
    expected.backward()
    output.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=name)
    for (name, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=name)


def test_the_weights_do_not_depend_on_the_number_of_views() -> None:
    states = [model_of(count).state_dict() for count in (2, 4)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def rank_main(rank: int, _: Path) -> dict[str, Tensor]:
    """Differentiate this rank's half of a batch of three views."""
    model = model_of(3)
    model.synchronize_(dist.group.WORLD)
    output = model(torch.cat([view.chunk(2)[rank] for view in batch(3, images=6).chunk(3)]))
    output.loss.backward()
    return {"loss": output.loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def test_ranks_average_to_the_gradient_of_one_process(tmp_path: Path) -> None:
    got = ranks.run(rank_main, tmp_path, ranks=2)
    model = model_of(3)
    loss = model(batch(3, images=6)).loss
    loss.backward()
    expected = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}
    for name, value in expected.items():
        mean = (got[0][name] + got[1][name]) / 2
        torch.testing.assert_close(mean, value, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=name)


def test_spread_is_that_of_one_view() -> None:
    x = torch.randn(4, 30, 8)
    assert torch.equal(embedding_std(x.flatten(0, 1), views=4), embedding_std(x[:2].flatten(0, 1)))
    assert not torch.equal(embedding_std(x.flatten(0, 1), views=4), embedding_std(x.flatten(0, 1)))


def test_more_views_leave_the_draws_of_the_first_two_as_they_were() -> None:
    kinds = [named(name).views for name in ("cifar10_tiny", "cifar10_tiny+global_views=5")]
    where = {"epochs": np.arange(6), "indices": np.arange(6) * 7, "sizes": np.full((6, 2), 32)}
    two, five = (views.draw(each, seed=4, **where).packed for each in kinds)
    assert torch.equal(five[:2], two)
    assert len({tuple(view[:, :4].flatten().tolist()) for view in five}) == 5
