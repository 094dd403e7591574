"""Rows of metrics.jsonl as the training loop fills them, with numbers that a GPU hands over some steps later."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch

from fastbyol.beton import Reader
from fastbyol.config import Config
from fastbyol.model.byol import Output, embedding_std
from fastbyol.model.parts import Optimizer
from fastbyol.monitor.logger import RunLogger
from fastbyol.monitor.watchdog import Watchdog
from fastbyol.schedule import Schedule
from fastbyol.system.device import STEPS_AHEAD, HostCopy
from fastbyol.system.distributed import World
from fastbyol.train.probe import Probe
from fastbyol.train.session import Position


class _Row(NamedTuple):
    """A row whose numbers may still be on their way from the device; left_s: seconds to the end of the run."""

    entries: dict[str, Any]
    numbers: HostCopy
    left_s: float


class RowWriter:
    """A queue of rows: each is shown to the watchdog and written once its numbers are on the host.

    On several ranks every rank writes at the same steps, since loss and spread are means over the ranks.
    """

    def __init__(
        self,
        config: Config,
        reader: Reader,
        world: World,
        *,
        optimizer: Optimizer,
        probe: Probe | None,
        watchdog: Watchdog,
        logger: RunLogger,
    ) -> None:
        self.optimizer, self.probe, self.watchdog, self.logger, self.world = optimizer, probe, watchdog, logger, world
        self._batch_size, self._images = config.recipe.batch_size, len(reader)
        self._views = len(config.recipe.global_views)
        self._behind = STEPS_AHEAD if config.device == "cuda" else 0  # steps, after which a GPU has them: nothing waits
        self._rows: deque[_Row] = deque()

    def start(self, at: Position, schedule: Schedule, *, elapsed_s: float, skipped_samples: int) -> dict[str, Any]:
        """Return the row of a position without the numbers on the device."""
        return {
            "step": at.step,
            "epoch": at.step * self._batch_size / self._images,
            "progress": at.progress,
            "elapsed_s": elapsed_s,
            "lr": schedule.learning_rate(at.progress),
            "tau": schedule.tau(at.progress),
            "crop_px": schedule.crop_px(at.progress),
            "skipped_samples": skipped_samples,
            "threads": torch.get_num_threads(),
        }

    def copy_numbers(self, output: Output) -> HostCopy:
        """Start copying the numbers of a row from the device."""
        spread = embedding_std(output.target_projections, views=self._views)
        probe = [] if self.probe is None else self.probe.take_sums().unbind()
        return HostCopy(
            torch.stack([x.detach().double() for x in (output.loss, spread, *self.optimizer.skipped, *probe)])
        )

    def append(self, entries: dict[str, Any], numbers: HostCopy, *, left_s: float) -> None:
        """Add a row; entries: all but the numbers."""
        self._rows.append(_Row(entries, numbers, left_s))

    def write_due(self, step: int) -> None:
        """Write the rows whose numbers the device has handed over by this step."""
        while self._rows and self._rows[0].entries["step"] <= step - self._behind:
            self._write(self._rows.popleft())

    def write_all(self) -> None:
        """Write every row, waiting for its numbers."""
        while self._rows:
            self._write(self._rows.popleft())

    def _write(self, row: _Row) -> None:
        """Complete a row with its numbers, show it to the watchdog, and write it."""
        values = row.numbers.read()
        loss, std = (value / self.world.ranks for value in self.world.total(values[:2]))
        skipped, skipped_in_a_row, *probe = values[2:]
        entries = row.entries | {"loss": loss, "embedding_std": std, "skipped_steps": int(skipped)}
        if probe:
            entries |= {f"probe_{name}": value for name, value in Probe.metrics(*probe)._asdict().items()}
        warning = self.watchdog.inspect(
            step=entries["step"],
            progress=entries["progress"],
            loss=loss,
            embedding_std=std,
            skipped_in_a_row=int(skipped_in_a_row) if self.optimizer.skips_bad_steps else None,
        )
        if warning:
            self.logger.warn(warning)
        self.logger.log_row(entries, left_s=row.left_s)
