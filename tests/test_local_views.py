"""Laws of local views, which the online network alone sees, held to the loss written out in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol import optim
from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig, OptimConfig
from fastbyol.model.batchnorm import set_views_
from fastbyol.model.byol import BYOL
from fastbyol.model.objective import Objective, local_attraction
from fastbyol.train import step
from tests.support import ranks
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL, NAIVE_STEPS_RTOL

TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
OWN = HeadConfig(hidden=16, out=8, local_predictor=True)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)
IMAGES, LOCAL = 5, 3


def written_out(q: Tensor, z: Tensor, local: Tensor, images: int = IMAGES) -> Tensor:
    """Compare every prediction with the mean of the image's projections, but for that of its own view."""
    total = torch.zeros((), dtype=q.dtype)
    unit = F.normalize(z, dim=1)
    for row, prediction in enumerate(torch.cat([q, local])):
        image = row % images
        others = [unit[each] for each in range(image, len(z), images) if each != row]
        difference = F.normalize(prediction, dim=0) - sum(others) / len(others)
        total = total + difference @ difference
    return 2 * total / (len(q) + len(local))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("number", [1, LOCAL])
def test_a_local_prediction_is_compared_with_all_targets_and_weighs_as_any_other(count: int, number: int) -> None:
    torch.manual_seed(3)
    q, z, local = (torch.randn(each * IMAGES, 7, dtype=torch.float64) for each in (count, count, number))
    wanted = [q.requires_grad_(), local.requires_grad_()]
    objective = Objective(ObjectiveConfig(), dimensions=7, seed=0).double()
    set_views_(objective, count)
    loss, expected = objective(q, z, local), written_out(q, z, local)
    torch.testing.assert_close(loss, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


@pytest.mark.parametrize("normalization", ["layernorm", "batchnorm", "none"])
def test_gradients_of_other_normalizations_match_finite_differences(normalization: str) -> None:
    q, z = torch.randn(6, 4, dtype=torch.float64).requires_grad_(), torch.randn(4, 4, dtype=torch.float64)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: local_attraction(a, b, views=2, normalization=normalization), (q, z))


def model_of(head: HeadConfig = HEAD, count: int = 2) -> BYOL:
    return BYOL(TINY, head, seed=1, views=count).double()


def batch(count: int = 2, images: int = IMAGES, seed: int = 0) -> step.Views:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count * images, 3, 16, 16), (LOCAL * images, 3, 8, 8))
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("head", [HEAD, OWN], ids=["shared", "own"])
def test_each_local_view_is_a_population_and_a_forward_of_its_own(head: HeadConfig, count: int) -> None:
    model = model_of(head, count)
    plain = copy.deepcopy(model)
    set_views_(plain, 1)
    views, local = batch(count)
    each = views.chunk(count)
    z = torch.cat([plain.target(view) for view in each]).detach()
    q = torch.cat([plain.predictor(plain.online(view)) for view in each])
    of_local = plain.local_predictor or plain.predictor
    expected = written_out(q, z, torch.cat([of_local(plain.online(view)) for view in local.chunk(LOCAL)]))
    loss = model(views, local).loss
    close(loss, expected)
    expected.backward()
    loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("head", [HEAD, OWN], ids=["shared", "own"])
def test_the_target_and_all_running_statistics_know_nothing_of_local_views(head: HeadConfig) -> None:
    views, local = batch()
    with_local, without = model_of(head), model_of(head)
    outputs = with_local(views, local), without(views)
    assert torch.equal(outputs[0].target_projections, outputs[1].target_projections)
    assert torch.equal(outputs[0].representations, outputs[1].representations)
    for (name, buffer), other in zip(with_local.named_buffers(), without.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    second = [model(views).loss for model in (with_local, without)]  # populations are as they were
    assert torch.equal(*second)


def test_a_predictor_of_their_own_leaves_the_other_weights_as_they_were() -> None:
    shared, own = model_of().state_dict(), model_of(OWN).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in shared.items())
    assert {name.partition(".")[0] for name in own.keys() - shared.keys()} == {"local_predictor"}


def engine_of(kind: type[step.Eager] = step.Eager, **options: str) -> step.Eager:
    model = model_of(OWN)
    return kind(model, optim.build(model, model.target_of(), OPTIM), **options)


def test_compiled_step_is_the_eager_step() -> None:
    engines = [engine_of(), engine_of(step.Compiled, backend="aot_eager")]
    for _ in range(2):
        losses = [engine(*batch(), lr=0.1, tau=0.9).loss for engine in engines]
        close(*losses)
    for (name, value), other in zip(
        engines[0].model.state_dict().items(), engines[1].model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=name)


@pytest.mark.slow
def test_later_steps_do_not_compile_again() -> None:
    torch._dynamo.reset()
    engine = engine_of(step.Compiled, backend="eager")
    engine(*batch(), lr=0.1, tau=0.9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        engine(*batch(), lr=0.1, tau=0.9)


def test_micro_batches_have_their_local_views() -> None:
    parts = [batch(seed=1), batch(seed=2)]
    accumulated, model = engine_of(), model_of(OWN)
    output = accumulated.accumulate(parts, count=2, lr=0.0, tau=1.0)
    close(output.loss, torch.stack([model(*part).loss.detach() for part in parts]).mean())


def rank_main(rank: int, _: Path) -> dict[str, Tensor]:
    """Differentiate this rank's half of a batch with local views."""
    model = model_of(OWN)
    model.synchronize_(dist.group.WORLD)
    views, local = batch(images=6)
    half = [torch.cat([view.chunk(2)[rank] for view in x.chunk(n)]) for x, n in ((views, 2), (local, LOCAL))]
    loss = model(*half).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def test_ranks_average_to_the_gradient_of_one_process(tmp_path: Path) -> None:
    got = ranks.run(rank_main, tmp_path, ranks=2)
    model = model_of(OWN)
    loss = model(*batch(images=6)).loss
    loss.backward()
    expected = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}
    for name, value in expected.items():
        mean = (got[0][name] + got[1][name]) / 2
        torch.testing.assert_close(mean, value, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=name)
