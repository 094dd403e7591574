"""The cost of a step, measured before the plan is made by a few steps of the run that leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from statistics import median
from typing import NamedTuple

from torch import Tensor, nn

from fastbyol.step import Optimizer

STEPS_MIN, STEPS_MAX = 3, 30
SHARE, SHARE_MAX = 0.02, 0.25  # of the time left: enough, and the most, however few steps that is
COLD_MAX = 0.9  # of the time left may go into steps that compile


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[Hashable, Tensor]:
    """Name every tensor that training moves: parameters, buffers, momenta, counters."""
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


class Measured(NamedTuple):
    """Give the seconds of a step; is_cold: no time was left for another than the first, which compiles and searches."""

    step_s: float
    is_cold: bool = False


def measure(
    step: Callable[[], float],
    live: Callable[[], dict[Hashable, Tensor]],
    *,
    warm_up: int,
    left_s: float,
    agree: Callable[[bool], bool],
    compiles: bool = False,
    is_settled: Callable[[], bool] = lambda: True,
    settle: Callable[[], None] = lambda: None,
) -> Measured:
    """Take a few steps, put everything back, and return the seconds of one, the median.

    step: take one and return its seconds. The first `warm_up` + 1 are not counted, neither as a step's time nor against
    the share of the time that may go into measuring: algorithms are chosen, memory is taken, graphs are captured.
    live: name the tensors that steps move; they get their values back in place, so that captured graphs stay valid, and
    those that the steps brought become 0. agree: make every rank go on as long as rank 0 does. compiles: the first
    steps take far longer than all others, as on a GPU, so that they do not foretell whether another would end in time.
    is_settled: tell whether the number of threads is chosen, before which no step counts; settle: choose it now, since
    a share of the time has gone.
    """
    before = {name: tensor.detach().cpu().clone() for name, tensor in live().items()}
    cold_s, warm = 0.0, list[float]()
    taken = 0
    while len(warm) < STEPS_MAX:
        is_cold, taken = taken <= warm_up or not is_settled(), taken + 1
        took_s = step()
        if is_cold:
            cold_s += took_s
            if not compiles and cold_s > SHARE_MAX * left_s:
                settle()
            if agree(cold_s > COLD_MAX * left_s if compiles else cold_s + took_s > left_s):
                break
            continue
        warm.append(took_s)
        spent_s, warm_left_s = sum(warm), left_s - cold_s
        is_enough = len(warm) >= STEPS_MIN and spent_s > SHARE * warm_left_s
        if agree(is_enough or spent_s > SHARE_MAX * warm_left_s):
            break
    for name, tensor in live().items():
        if name in before:
            tensor.detach().copy_(before[name])
        else:
            tensor.detach().zero_()
    return Measured(median(warm)) if warm else Measured(took_s, is_cold=compiles)
