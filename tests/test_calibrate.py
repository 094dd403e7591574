"""Laws of calibration: it measures real steps and leaves no trace of them."""

from __future__ import annotations

import copy
import time

import torch

from fastbyol import calibrate, optim, step
from fastbyol.byol import BYOL
from fastbyol.recipes import named


def engine_of(*, target_statistics: str = "batch") -> step.Eager:
    recipe = named("demo")
    model = BYOL(recipe.encoder, recipe.head, seed=0, target_statistics=target_statistics)
    return step.engine("eager", model, optim.build(model, model.target_of(), recipe.optim))


def live(engine: step.Eager) -> dict[object, torch.Tensor]:
    return calibrate.tensors(engine.model, engine.optimizer)


def take(engine: step.Eager, seed: int) -> float:
    views = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    began_s = time.perf_counter()
    engine(views, lr=0.5, tau=0.9)
    return time.perf_counter() - began_s


def calibrated(engine: step.Eager) -> float:
    seeds = iter(range(100, 200))
    return calibrate.measure(lambda: take(engine, next(seeds)), lambda: live(engine), warm_up=0, left_s=0.0, agree=bool)


def test_a_calibrated_run_is_bit_equal_to_one_that_was_not() -> None:
    for steps_before in (0, 2):
        plain, other = engine_of(target_statistics="running"), engine_of(target_statistics="running")
        for seed in range(steps_before):
            take(plain, seed), take(other, seed)
        before = copy.deepcopy(other.model.state_dict())
        assert calibrated(other) > 0
        assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
        for seed in range(10, 13):
            take(plain, seed), take(other, seed)
        for mine, theirs in zip(live(plain).values(), live(other).values(), strict=True):
            assert torch.equal(mine, theirs)


def test_tensors_keep_their_addresses() -> None:
    engine = engine_of()
    take(engine, 0)
    before = [tensor.data_ptr() for tensor in live(engine).values()]
    calibrated(engine)
    assert [tensor.data_ptr() for tensor in live(engine).values()] == before
