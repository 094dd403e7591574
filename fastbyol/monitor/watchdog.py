"""Watchdog for the two failures of training: steps without a finite gradient, and collapse."""

from __future__ import annotations

import math

SKIPS_MAX = 10  # steps in a row without a finite gradient; fewer happen by chance and cost only themselves
COLLAPSED = 0.1  # of the healthy 1/sqrt(D); see docs/numerics.md
STRETCH = 0.05  # of a run; embeddings below the threshold for less time do not count as collapsed


class Diverged(RuntimeError):
    """The loss is no longer finite, or all images have one embedding; the message says where, and what to do."""


class Watchdog:
    """A watchdog over the rows of a run whose embeddings have `dimensions` dimensions.

    `low_since` is the progress at which the embeddings' std fell below the threshold, None while it is above.
    """

    def __init__(self, *, dimensions: int, stops_on_collapse: bool) -> None:
        self._threshold = COLLAPSED / math.sqrt(dimensions)
        self._stops = stops_on_collapse
        self.low_since: float | None = None
        self._has_warned = False

    def inspect(
        self, *, step: int, progress: float, loss: float, embedding_std: float, skipped_in_a_row: int | None
    ) -> str | None:
        """Return a warning of collapse, once, or None; raise Diverged where it is no use to continue.

        skipped_in_a_row: steps up to this one that the optimiser skipped for inf or NaN; None where it never skips, so
        that the first loss that is not finite has already damaged the weights.
        """
        if skipped_in_a_row is None and not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step}; lower --base-lr and start anew")
        if skipped_in_a_row is not None and skipped_in_a_row >= SKIPS_MAX:
            raise Diverged(
                f"{skipped_in_a_row} steps in a row up to step {step} had no finite gradient and were skipped; the "
                "checkpoints are older than that; lower --base-lr and start anew"
            )
        return self._inspect_collapse(step, progress, embedding_std)

    def _inspect_collapse(self, step: int, progress: float, embedding_std: float) -> str | None:
        if embedding_std >= self._threshold:
            self.low_since = None
            return None
        if self.low_since is None:
            self.low_since = progress
        if progress - self.low_since < STRETCH or (self._has_warned and not self._stops):
            return None
        message = (
            f"the embeddings have collapsed: their std is {embedding_std:.2g} at step {step}, below "
            f"{self._threshold:.2g} for {progress - self.low_since:.0%} of the run"
        )
        if self._stops:
            raise Diverged(f"{message}; raise --tau-base, lower --base-lr or --weight-decay")
        self._has_warned = True
        return f"{message}; --stop-on-collapse would end the run here"
