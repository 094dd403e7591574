"""The time of a step, measured by a few real steps whose effects are undone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from statistics import median
from typing import NamedTuple

from torch import Tensor, nn

from fastbyol.model.parts import Optimizer

STEPS_MIN, STEPS_MAX = 3, 30
SHARE, SHARE_MAX = 0.02, 0.25  # of the time left: what is enough, and the most, even for fewer than STEPS_MIN steps
COLD_MAX = 0.9  # of the time left at most goes into steps that compile


def trained_tensors(model: nn.Module, optimizer: Optimizer) -> dict[Hashable, Tensor]:
    """Return every tensor that training changes: parameters, buffers, momenta, counters."""
    momenta: dict[Hashable, Tensor] = {
        (id(parameter), name): value
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    own: dict[Hashable, Tensor] = {
        (id(model), name): value for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    return {**own, **momenta, (id(optimizer), "skipped"): optimizer.skipped}


class StepTime(NamedTuple):
    """The seconds of a step; is_cold: measured on a first step, which compiles and searches, for lack of time."""

    step_s: float
    is_cold: bool = False


def measure_step(
    step: Callable[[], float],
    list_tensors: Callable[[], dict[Hashable, Tensor]],
    *,
    warm_up: int,
    left_s: float,
    agree: Callable[[bool], bool],
    compiles: bool = False,
    has_threads: Callable[[], bool] = lambda: True,
    choose_threads: Callable[[], None] = lambda: None,
) -> StepTime:
    """Take a few steps, undo them, and return the median time of one.

    step: takes one step and returns its seconds. The first `warm_up` + 1 count neither as a step's time nor towards the
    share of the time left that may go into measuring: they choose algorithms, allocate memory and capture graphs.
    list_tensors: returns the tensors that steps change. They get their values back in place, so that captured graphs
    stay valid; those that the steps created become 0. agree: returns rank 0's decision on every rank. compiles: the
    first steps take far longer than all others, as on a GPU, so that they do not predict whether another would end in
    time. has_threads: tells whether the number of threads is chosen; steps before that do not count. choose_threads:
    chooses it at once, called when too much of the time has gone.
    """
    before = {name: tensor.detach().cpu().clone() for name, tensor in list_tensors().items()}
    cold_s, warm = 0.0, list[float]()
    taken = 0
    while len(warm) < STEPS_MAX:
        is_cold, taken = taken <= warm_up or not has_threads(), taken + 1
        took_s = step()
        if is_cold:
            cold_s += took_s
            if not compiles and cold_s > SHARE_MAX * left_s:
                choose_threads()
            if agree(cold_s > COLD_MAX * left_s if compiles else cold_s + took_s > left_s):
                break
            continue
        warm.append(took_s)
        spent_s, warm_left_s = sum(warm), left_s - cold_s
        is_enough = len(warm) >= STEPS_MIN and spent_s > SHARE * warm_left_s
        if agree(is_enough or spent_s > SHARE_MAX * warm_left_s):
            break
    for name, tensor in list_tensors().items():
        if name in before:
            tensor.detach().copy_(before[name])
        else:
            tensor.detach().zero_()
    return StepTime(median(warm)) if warm else StepTime(took_s, is_cold=compiles)
