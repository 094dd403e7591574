"""Know what a step costs before the plan is made: a few steps of the run that leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from torch import Tensor

from fastbyol.step import Eager

STEPS_MIN, STEPS_MAX = 3, 30
SHARE = 0.02  # of the time left, at most


def tensors(engine: Eager) -> list[Tensor]:
    """Name every tensor a step moves, in an order that does not change."""
    optimizer = engine.optimizer
    momenta = [entry for state in optimizer.state.values() for entry in state.values() if isinstance(entry, Tensor)]
    return [*engine.model.parameters(), *engine.model.buffers(), optimizer.skipped, *momenta]


def measure(
    engine: Eager, step: Callable[[], float], *, warm_up: int, left_s: float, agree: Callable[[float], float]
) -> float:
    """Take a few steps, put everything back, and return the seconds of one, the median.

    step: take one and return its seconds. The first `warm_up` + 1 are not counted: algorithms are chosen, memory is
    taken, graphs are captured. agree: make every rank go on as long as rank 0 does.
    """
    before = [tensor.detach().cpu().clone() for tensor in tensors(engine)]
    spent_s, seconds = 0.0, []
    for number in range(warm_up + 1 + STEPS_MAX):
        took_s = step()
        spent_s += took_s
        if number > warm_up:
            seconds.append(took_s)
        is_enough = len(seconds) >= STEPS_MIN and spent_s > SHARE * left_s
        if agree(float(is_enough)):
            break
    restore(tensors(engine), before)
    return median(seconds)


def restore(live: Iterable[Tensor], before: list[Tensor]) -> None:
    """Write the values back in place, so that captured graphs stay valid; what was not there before becomes 0."""
    for number, tensor in enumerate(live):
        if number < len(before):
            tensor.detach().copy_(before[number])
        else:
            tensor.detach().zero_()
