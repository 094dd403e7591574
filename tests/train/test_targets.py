"""Laws of where targets come from, of heads of any depth, and of objectives within the one step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol import optim, schedule
from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig, OptimConfig
from fastbyol.model.byol import BYOL, MLP
from fastbyol.train import step
from tests.support import ranks
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL, NAIVE_STEPS_RTOL

TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)
NO_PREDICTOR = HeadConfig(hidden=16, out=8, predictor_depth=0)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(count)]


def model_of(head: HeadConfig = HEAD, **objective: Any) -> BYOL:
    return BYOL(TINY, head, seed=1, objective=ObjectiveConfig(**objective)).double()


def engine_of(model: BYOL, kind: type[step.Eager] = step.Eager, **options: Any) -> step.Eager:
    return kind(model, optim.build(model, model.target_of(), OPTIM), **options)


def test_constant_target_never_moves() -> None:
    model = model_of(target="constant")
    before = [p.clone() for p in model.target.parameters()]
    engine = engine_of(model)
    for views in batches(3):
        engine(views, lr=0.5, tau=0.5)
    assert all(torch.equal(p, b) for p, b in zip(model.target.parameters(), before, strict=True))
    assert not torch.equal(model.online.encoder.conv1.weight, before[0])


def test_stop_gradient_of_the_online_network_is_a_target_at_tau_zero() -> None:
    copied, stopped = engine_of(model_of()), engine_of(model_of(target="stop-gradient"))
    for views in batches(3):
        losses = [engine(views, lr=0.5, tau=0.0).loss.item() for engine in (copied, stopped)]
        assert losses[0] == pytest.approx(losses[1], rel=FLOAT64_RTOL)
    assert stopped.model.target is None
    for a, b in zip(copied.model.online.parameters(), stopped.model.online.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)


@pytest.mark.parametrize("head", [HEAD, NO_PREDICTOR], ids=["predictor", "no predictor"])
@pytest.mark.parametrize("target", ["online", "stop-gradient"])
def test_gradient_flows_into_the_target_only_when_it_is_online(target: str, head: HeadConfig) -> None:
    model, views = model_of(head, target=target), batches(1)[0]
    naive = copy.deepcopy(model)
    model(views).loss.backward()
    z = naive.online(views)
    q, goals = naive.predictor(z), torch.cat(z.chunk(2)[::-1])
    goals = goals if target == "online" else goals.detach()
    (2 * (2 - 2 * F.cosine_similarity(q, goals, dim=1)).mean()).backward()
    for ours, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=FLOAT64_ATOL)


def test_tau_rises_to_one_or_stays() -> None:
    assert schedule.ema_rate(0.3, base=0.9, rises=False) == schedule.ema_rate(1.0, base=0.9, rises=False) == 0.9
    assert schedule.ema_rate(1.0, base=0.0) == 1
    assert schedule.ema_rate(0.7, base=0.0, rises=False) == 0


@pytest.mark.parametrize(("depth", "layers"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_depth_counts_linear_layers_of_which_the_last_is_bare(depth: int, layers: int) -> None:
    mlp = MLP(5, HeadConfig(hidden=16, out=8), depth=depth)
    linear = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    assert len(linear) == layers
    assert mlp(torch.randn(4, 5)).shape == (4, 8 if depth else 5)
    assert all(layer.bias is not None for layer in linear[:-1])
    if depth:
        assert mlp[-1] is linear[-1]
        assert linear[-1].bias is None


def test_a_head_of_depth_two_keeps_the_names_of_earlier_checkpoints() -> None:
    names = {name.split(".")[0] for name in MLP(5, HEAD, depth=2).state_dict()}
    assert names == {"0", "1", "3"}
    roots = {name.split(".")[0] for name in model_of().state_dict()}
    assert roots == {"online", "predictor", "target"}


@pytest.mark.parametrize("predictor_depth", [0, 1, 3])
@pytest.mark.parametrize("projector_depth", [1, 3])
def test_every_depth_takes_a_step_and_ends_finite(projector_depth: int, predictor_depth: int) -> None:
    head = HeadConfig(hidden=16, out=8, projector_depth=projector_depth, predictor_depth=predictor_depth)
    model = model_of(head)
    before = copy.deepcopy(model.state_dict())
    engine_of(model)(batches(1)[0], lr=0.5, tau=0.5)
    moved = model.state_dict()
    assert all(value.isfinite().all() for value in moved.values())
    assert all(not torch.equal(before[name], moved[name]) for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("head", "objective"),
    [
        (NO_PREDICTOR, {"target": "online", "beta": 1.0}),
        (NO_PREDICTOR, {"beta": 1.0, "queue": 40}),
        (HEAD, {"normalization": "batchnorm"}),
        (HEAD, {"target": "stop-gradient"}),
        (NO_PREDICTOR, {"target": "online", "loss": "vicreg"}),
        (NO_PREDICTOR, {"target": "online", "loss": "coding-rate"}),
    ],
    ids=["simclr", "moco", "batchnorm", "stop-gradient", "vicreg", "coding-rate"],
)
def test_compiled_objectives_are_the_eager_ones(head: HeadConfig, objective: dict[str, Any]) -> None:
    engines = [
        engine_of(model_of(head, **objective)),
        engine_of(model_of(head, **objective), step.Compiled, backend="aot_eager"),
    ]
    for views in batches(2):
        losses = [engine(views, lr=0.1, tau=0.9).loss.item() for engine in engines]
        assert losses[0] == pytest.approx(losses[1], rel=NAIVE_STEPS_RTOL)
    eager, compiled = (engine.model.state_dict() for engine in engines)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)


SIMCLR = {"target": "online", "beta": 1.0}


def rank_main(rank: int, folder: Path) -> dict[str, Tensor]:  # noqa: ARG001
    """Differentiate this rank's half of a batch of SimCLR."""
    model = model_of(NO_PREDICTOR, **SIMCLR)
    model.synchronize_(dist.group.WORLD)
    model(torch.cat([view.chunk(2)[rank] for view in batches(1)[0].chunk(2)])).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_ranks_average_to_the_gradient_of_one_process(tmp_path: Path) -> None:
    got = ranks.run(rank_main, tmp_path, ranks=2)
    model = model_of(NO_PREDICTOR, **SIMCLR)
    model(batches(1)[0]).loss.backward()
    for name, p in model.named_parameters():
        mean = (got[0][name] + got[1][name]) / 2
        torch.testing.assert_close(mean, p.grad, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL, msg=name)


def test_simclr_by_hand_over_three_steps() -> None:
    """Negatives, no predictor, no target: the step is LARS on 4 + 4 * temperature * NT-Xent."""
    ours = engine_of(model_of(NO_PREDICTOR, target="online", beta=1.0, temperature=0.2))
    online = copy.deepcopy(ours.model.online)
    lars = optim.build(online, {}, OPTIM)
    lars.set_rates(lr=0.5, tau=1.0)
    for views in batches(3):
        loss = ours(views, lr=0.5, tau=1.0).loss
        z = F.normalize(online(views), dim=1)
        logits = (z @ z.T / 0.2).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
        expected = 4 + 4 * 0.2 * F.cross_entropy(logits, (torch.arange(12) + 6) % 12)
        lars.zero_grad()
        expected.backward()
        lars.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)
