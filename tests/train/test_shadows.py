"""Laws of the forward by copies of weights: it is autocast's step, bit for bit, and nothing of it is saved."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbyol import optim
from fastbyol.byol import BYOL
from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig, OptimConfig
from fastbyol.encoder import ResNet
from fastbyol.errors import ConfigError
from fastbyol.train import step
from fastbyol.train.shadows import ShadowedForward

TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)
STEPS = 3


def engine_of(model: BYOL, *, copies: bool) -> step.Eager:
    lars = optim.build(model, model.target_of(), OPTIM)
    engine = step.engine("eager", model, lars, precision="bfloat16")
    if copies:
        engine.forward = ShadowedForward(model, lars)
    return engine


def views_of(number: int, *, px: int = 16) -> Tensor:
    return torch.randn(12, 3, px, px, generator=torch.Generator().manual_seed(number))


def train(engine: step.Eager, numbers: range, *, px: int = 16) -> list[float]:
    return [engine(views_of(k, px=px), lr=0.5 / (k + 1), tau=0.9).loss.item() for k in numbers]


def saved(engine: step.Eager) -> list[dict[str, Any]]:
    """Return what a checkpoint holds, by way of its bytes."""
    file = io.BytesIO()
    torch.save([engine.model.state_dict(), engine.optimizer.state_dict()], file)
    file.seek(0)
    state: list[dict[str, Any]] = torch.load(file, weights_only=True)
    return state


def load(engine: step.Eager, state: list[dict[str, Any]]) -> None:
    engine.model.load_state_dict(state[0])
    engine.optimizer.load_state_dict(state[1])


def check_equal(one: step.Eager, other: step.Eager) -> None:
    model, its = one.model.state_dict(), other.model.state_dict()
    assert model.keys() == its.keys()
    assert [name for name, value in model.items() if not torch.equal(value, its[name])] == []
    momenta, their = (engine.optimizer.state_dict()["state"] for engine in (one, other))
    assert momenta.keys() == their.keys()
    assert all(state.keys() == {"momentum"} for state in momenta.values())
    assert all(torch.equal(state["momentum"], their[key]["momentum"]) for key, state in momenta.items())


def check_copies(engine: step.Eager, *, count: int | None = None) -> None:
    assert isinstance(engine.forward, ShadowedForward)
    copies = engine.forward.shadows.of
    assert all(torch.equal(copied, x.bfloat16()) for x, copied in copies.items())
    assert count in (None, len(engine.forward._names))


@pytest.mark.parametrize(
    ("encoder", "px", "options", "count"),
    [
        (TINY, 16, {}, 11 + 11 + 5),  # weights of convolutions, then of two projectors and a predictor with biases
        (EncoderConfig("resnet50", width=1 / 32), 40, {}, 53 + 53 + 9),
        (EncoderConfig("resnet50", width=1 / 32, padding="same"), 40, {}, 53 + 53 + 9),
        (replace(TINY, frozen="conv1 layer1"), 16, {}, None),
        (TINY, 16, {"objective": ObjectiveConfig(target="online", beta=1.0)}, None),
        (TINY, 16, {"objective": ObjectiveConfig(target="constant")}, None),
    ],
    ids=["resnet8", "resnet50", "same", "frozen", "simclr", "constant"],
)
def test_steps_by_copies_are_autocasts_bit_for_bit(
    encoder: EncoderConfig, px: int, options: dict[str, Any], count: int | None
) -> None:
    engines = [engine_of(BYOL(encoder, HEAD, seed=1, **options), copies=copies) for copies in (False, True)]
    losses = [train(engine, range(STEPS), px=px) for engine in engines]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == STEPS
    check_equal(*engines)
    check_copies(engines[1], count=count)


def test_micro_batches_by_copies_are_autocasts() -> None:
    engines = [engine_of(BYOL(TINY, HEAD, seed=1), copies=copies) for copies in (False, True)]
    for number in range(STEPS):
        parts = [views_of(2 * number + part) for part in range(2)]
        losses = [engine.accumulate(zip(parts), count=2, lr=0.5, tau=0.9).loss for engine in engines]
        assert torch.equal(*losses)
    check_equal(*engines)


@pytest.mark.parametrize("copies", [(True, True), (True, False), (False, True)], ids=str)
def test_a_run_resumes_bit_equal_with_and_without_copies(copies: tuple[bool, bool]) -> None:
    whole, first = (engine_of(BYOL(TINY, HEAD, seed=1), copies=copies[0]) for _ in range(2))
    train(whole, range(2 * STEPS))
    train(first, range(STEPS))
    resumed = engine_of(BYOL(TINY, HEAD, seed=2), copies=copies[1])
    load(resumed, saved(first))
    train(resumed, range(STEPS, 2 * STEPS))
    check_equal(whole, resumed)


def test_a_state_loaded_in_the_midst_of_training_is_copied() -> None:
    engine, other = (engine_of(BYOL(TINY, HEAD, seed=seed), copies=True) for seed in (1, 2))
    train(engine, range(STEPS))
    state = saved(engine)
    train(other, range(1))
    load(other, state)
    assert train(engine, range(STEPS, 2 * STEPS)) == train(other, range(STEPS, 2 * STEPS))
    check_equal(engine, other)


def test_a_skipped_step_leaves_the_copies_of_what_was_loaded_before_it() -> None:
    engine = engine_of(BYOL(TINY, HEAD, seed=1), copies=True)
    train(engine, range(1))
    engine.model.load_state_dict(BYOL(TINY, HEAD, seed=2).state_dict())
    for parameter in engine.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf) if parameter.requires_grad else None
    engine.optimizer.step()
    assert engine.optimizer.skipped.tolist() == [1, 1]
    check_copies(engine)


def test_a_copy_of_the_optimiser_keeps_none() -> None:
    engine = engine_of(BYOL(TINY, HEAD, seed=1), copies=True)
    _, twin = copy.deepcopy((engine.model, engine.optimizer))
    assert engine.optimizer.shadows is not None
    assert twin.shadows is None


def test_others_encoders_other_precisions_and_lagged_targets_are_refused() -> None:
    class Own(ResNet):
        """An encoder whose forward nobody here knows."""

    model = BYOL(TINY, HEAD, seed=1)
    engine = engine_of(model, copies=True)
    with pytest.raises(ConfigError, match=r"bfloat16, and torch\.float32"):
        engine.forward(views_of(0))
    with engine.autocast(), pytest.raises(ConfigError, match="lagged target"):
        engine.forward(views_of(0), tau=torch.ones(()))
    model.online.encoder = Own(TINY)
    with pytest.raises(ConfigError, match="only fastbyol's own ResNets"):
        engine_of(model, copies=True)
