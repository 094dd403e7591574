"""Checkpoints of the training loop: of good steps only, also while no images come, with a warning where one fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastbyol.model.byol import Output
from fastbyol.model.parts import Optimizer, count_moments
from fastbyol.storage.checkpoint import Saver


def moments_to_come(module: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Return tensors of the sizes of those that the first step adds to an optimiser's state; none after it."""
    if optimizer.state:
        return []
    trained = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
    return trained * count_moments(optimizer)


class Checkpoints:
    """The checkpoints of one loop.

    read_state: returns the state to save, with its "step"; warn: reports a failed write; saves: False on ranks other
    than 0.
    """

    def __init__(
        self, saver: Saver, read_state: Callable[[], dict[str, Any]], *, warn: Callable[[str], None], saves: bool
    ) -> None:
        self.saver, self._read_state, self._warn, self._saves = saver, read_state, warn, saves

    def save(self, step: int) -> None:
        """Start writing a checkpoint of the position after `step` steps, unless that is written already."""
        if self._saves and self.saver.saved_step != step:
            self.saver.save(self._read_state(), step=step)

    def save_if_good(self, step: int, output: Output, optimizer: Optimizer) -> bool:
        """Save unless a checkpoint is being written or the last step was not finite (host sync); tell whether."""
        self._warn_of_failure()
        is_good = math.isfinite(output.loss.item()) and int(optimizer.skipped[1]) == 0
        if not is_good or self.saver.is_writing:
            return False
        self.save(step)
        return True

    def save_while_stalled(self, step: int) -> None:
        """Save the position if a signal arrived while no images come: a disk that hangs may stall the loop forever."""
        if step:
            self.save(step)
            self.saver.wait()
            self._warn_of_failure()
        is_saved = self.saver.saved_step == step
        saved = f"step {step} is saved" if is_saved else "nothing new is saved"
        self._warn(f"asked to stop while no images come; {saved}; a second signal ends the run at once")

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Wait for the last checkpoint after the with-block, but not after a second signal, which quits at once."""
        try:
            yield
        except KeyboardInterrupt:
            self.saver.abandon()
            raise
        finally:
            self.saver.wait()
            self._warn_of_failure()

    def _warn_of_failure(self) -> None:
        failure = self.saver.pop_failure()
        if failure is not None:
            newest = "none is" if self.saver.saved_step is None else f"that of step {self.saver.saved_step} is"
            self._warn(f"a checkpoint could not be written ({failure}); {newest} on disk, and training goes on")
