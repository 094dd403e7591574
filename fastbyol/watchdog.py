"""Know the two ways a run goes wrong while it computes: steps without a finite gradient, and collapse."""

from __future__ import annotations

import math

SKIPS_MAX = 10  # steps in a row without a finite gradient; fewer are chance, and cost nothing but themselves
COLLAPSED = 0.1  # of the healthy 1/sqrt(D); see docs/numerics.md
STRETCH = 0.05  # of a run below it, before it counts


class Diverged(RuntimeError):
    """Tell that the loss is no longer a number, or that all images have one embedding; where, and what to do."""


class Watchdog:
    """Look at each row of a run with embeddings of D dimensions; warn once, or end it.

    Attribute `low_since`: the progress at which the embeddings' std fell under the threshold, None above it.
    """

    def __init__(self, *, dimensions: int, stops_on_collapse: bool) -> None:
        self._threshold = COLLAPSED / math.sqrt(dimensions)
        self._stops = stops_on_collapse
        self.low_since: float | None = None
        self._has_warned = False

    def inspect(
        self, *, step: int, progress: float, loss: float, embedding_std: float, skipped_in_a_row: int | None
    ) -> str | None:
        """Return a warning, or None; raise Diverged where going on is of no use.

        skipped_in_a_row: steps up to this one that the optimiser skipped for inf or NaN; None where it skips none, so
        that the first loss which is not finite has already spoilt the weights.
        """
        if skipped_in_a_row is None and not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step}; lower --base-lr and start anew")
        if skipped_in_a_row is not None and skipped_in_a_row >= SKIPS_MAX:
            raise Diverged(
                f"{skipped_in_a_row} steps in a row up to step {step} had no finite gradient, and were skipped; the "
                "checkpoints are from before; lower --base-lr and start anew"
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
        told = (
            f"the embeddings have collapsed: their std is {embedding_std:.2g} at step {step}, under "
            f"{self._threshold:.2g} for {progress - self.low_since:.0%} of the run"
        )
        if self._stops:
            raise Diverged(f"{told}; raise --tau-base, lower --base-lr or --weight-decay")
        self._has_warned = True
        return f"{told}; --stop-on-collapse would end the run here"
