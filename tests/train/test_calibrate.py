"""Laws of calibration: it measures real steps and leaves no trace of them."""

from __future__ import annotations

import copy
import itertools
import time

import pytest
import torch

from fastbyol import optim
from fastbyol.model.byol import BYOL
from fastbyol.recipes import named
from fastbyol.system.device import STEPS_AHEAD
from fastbyol.train import calibrate, step


def engine_of(*, target_statistics: str = "batch") -> step.Eager:
    recipe = named("demo")
    model = BYOL(recipe.encoder, recipe.head, seed=0, target_statistics=target_statistics)
    return step.engine("eager", model, optim.build(model, model.target_of(), recipe.optim))


def live(engine: step.Eager) -> dict[object, torch.Tensor]:
    return calibrate.trained_tensors(engine.model, engine.optimizer)


def take(engine: step.Eager, seed: int) -> float:
    views = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    began_s = time.perf_counter()
    engine(views, lr=0.5, tau=0.9)
    return time.perf_counter() - began_s


def calibrated(engine: step.Eager) -> float:
    seeds = iter(range(100, 200))
    measured = calibrate.measure_step(
        lambda: take(engine, next(seeds)), lambda: live(engine), warm_up=0, left_s=0.0, agree=bool
    )
    return measured.step_s


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


class Clock:
    """A clock that steps move: the first `cold` take 30 s each, the others 0.2 s."""

    def __init__(self, *, cold: int, cold_s: float = 30.0, warm_s: float = 0.2) -> None:
        self.durations_s = itertools.chain(itertools.repeat(cold_s, cold), itertools.repeat(warm_s))
        self.now_s = 0.0

    def step(self) -> float:
        took_s = next(self.durations_s)
        self.now_s += took_s
        return took_s

    def measure(self, left_s: float, *, warm_up: int = 0, compiles: bool = True) -> calibrate.StepTime:
        return calibrate.measure_step(self.step, dict, warm_up=warm_up, left_s=left_s, agree=bool, compiles=compiles)


class Pipeline:
    """A clock of a host that prepares steps, at most STEPS_AHEAD before the GPU that computes them."""

    def __init__(self, *, host_s: float, gpu_s: float) -> None:
        self.host_s, self.gpu_s = host_s, gpu_s
        self.now_s = 0.0
        self.ends_s = [0.0]

    def step(self) -> float:
        began_s = self.now_s
        self.now_s += self.host_s
        self.ends_s.append(max(self.now_s, self.ends_s[-1]) + self.gpu_s)
        if len(self.ends_s) > STEPS_AHEAD:
            self.now_s = max(self.now_s, self.ends_s[-1 - STEPS_AHEAD])
        return self.now_s - began_s


@pytest.mark.parametrize(("host_s", "gpu_s"), [(0.004, 0.016), (0.001, 0.2), (0.02, 0.005)])
def test_a_step_takes_what_the_slower_of_host_and_gpu_takes(host_s: float, gpu_s: float) -> None:
    pipeline = Pipeline(host_s=host_s, gpu_s=gpu_s)
    measured = calibrate.measure_step(
        pipeline.step, dict, warm_up=STEPS_AHEAD, left_s=100 * gpu_s, agree=bool, compiles=True
    )
    assert measured.step_s == pytest.approx(max(host_s, gpu_s))


@pytest.mark.parametrize(("cold", "warm_up", "least_s"), [(1, 0, 60), (1, 3, 60), (2, 3, 90)])
def test_cold_steps_do_not_enter_the_plan(cold: int, warm_up: int, least_s: int) -> None:
    for budget_s in (least_s, 120, 300, 1200):
        clock, left_s = Clock(cold=cold), budget_s - 15.0  # start-up, and what is kept for the end
        planned_steps = (left_s - clock.now_s) / clock.measure(left_s, warm_up=warm_up).step_s
        assert planned_steps == pytest.approx(left_s / 0.2, rel=0.1)
        assert clock.now_s < cold * 30 + calibrate.SHARE_MAX * left_s


def test_a_cold_step_that_leaves_no_time_is_the_last() -> None:
    clock = Clock(cold=9)
    assert clock.measure(32.0, warm_up=3) == (30.0, True)
    assert clock.now_s == 30


def test_steps_as_slow_as_the_first_never_outlast_the_time_left() -> None:
    for left_s in (25.0, 45.0, 70.0, 100.0):
        clock = Clock(cold=0, warm_s=20.0)
        assert clock.measure(left_s, compiles=False) == (20.0, False)
        assert clock.now_s <= left_s
