"""Know what a step costs before the plan is made: a few steps of the run that leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from statistics import median

from torch import Tensor, nn

from fastbyol.step import Optimizer

STEPS_MIN, STEPS_MAX = 3, 30
SHARE, SHARE_MAX = 0.02, 0.25  # of the time left: enough, and the most, however few steps that is


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


def measure(
    step: Callable[[], float],
    live: Callable[[], dict[Hashable, Tensor]],
    *,
    warm_up: int,
    left_s: float,
    agree: Callable[[bool], bool],
) -> float:
    """Take a few steps, put everything back, and return the seconds of one, the median.

    step: take one and return its seconds. The first `warm_up` + 1 are not counted: algorithms are chosen, memory is
    taken, graphs are captured. live: name the tensors that steps move; they get their values back in place, so that
    captured graphs stay valid, and those that the steps brought become 0. agree: make every rank go on as long as
    rank 0 does.
    """
    before = {name: tensor.detach().cpu().clone() for name, tensor in live().items()}
    spent_s, seconds = 0.0, []
    for number in range(warm_up + 1 + STEPS_MAX):
        took_s = step()
        spent_s += took_s
        if number > warm_up:
            seconds.append(took_s)
        is_enough = len(seconds) >= STEPS_MIN and spent_s > SHARE * left_s
        if agree(is_enough or spent_s > SHARE_MAX * left_s):
            break
    for name, tensor in live().items():
        if name in before:
            tensor.detach().copy_(before[name])
        else:
            tensor.detach().zero_()
    return median(seconds) if seconds else took_s
