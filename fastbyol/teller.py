"""Logger of a training run: rows, warnings and profile, written by rank 0 alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch

from fastbyol.beton import Reader
from fastbyol.config import Config
from fastbyol.distributed import World
from fastbyol.flops import Meter
from fastbyol.loaders import decoding_threads
from fastbyol.profiling import Profile
from fastbyol.runfolder import RunFolder
from fastbyol.starvation import StarvationMonitor
from fastbyol.telemetry import Telemetry, peak_gib
from fastbyol.wandb_run import WandbRun


class RunLogger:
    """The logger of one run, on every rank; only rank 0 writes, and only inside open().

    `pending_warnings` holds the warnings that no row holds, for the report. reader: the training images; their size
    decides how many threads decode.
    """

    def __init__(self, config: Config, folder: RunFolder, world: World, *, reader: Reader) -> None:
        self.config, self.folder, self.world = config, folder, world
        self.pending_warnings: list[str] = []
        self._telemetry: Telemetry | None = None
        self._profile: Profile | None = None
        self.decoding_threads = decoding_threads(config.loader, reader, workers=config.workers)
        self._starvation = StarvationMonitor(
            threads=self.decoding_threads,
            loader=config.loader,
            local_ranks=world.local_ranks,
            ranks=world.ranks,
        )
        name = torch.cuda.get_device_name() if config.device == "cuda" else None
        self._meter = Meter(config.recipe, device_name=name, precision=config.precision, gpus=world.ranks)

    @contextmanager
    def open(self, *, from_step: int) -> Iterator[None]:
        """Open the files of rank 0 for the with-block; drop rows after `from_step`, whose steps are taken again."""
        if not self.world.is_main:
            yield
            return
        config, folder = self.config, self.folder
        with ExitStack() as stack:
            extra_sink = None
            if config.wandb is not None:
                name, settings = str(folder.path), asdict(config)
                extra_sink = WandbRun(
                    config.wandb, folder=folder.path, name=name, settings=settings, is_new=from_step == 0
                )
            tensorboard = folder.tensorboard if config.tensorboard else None
            self._telemetry = stack.enter_context(
                Telemetry(
                    folder.metrics,
                    from_step=from_step,
                    tensorboard=tensorboard,
                    extra_sink=extra_sink,
                    pending_warnings=self.pending_warnings,
                )
            )
            if config.profile:
                profile = Profile(folder.profile, device=config.device, warn=self.warn)
                self._profile = stack.enter_context(profile)
            try:
                yield
            finally:
                self._telemetry = self._profile = None

    def warn(self, text: str) -> None:
        """Print a warning on rank 0 and keep it for the next row or, after the last row, for the report."""
        if self._telemetry is not None:
            self._telemetry.warn(text)
        elif self.world.is_main:
            print(f"warning: {text}", file=sys.stderr)
            self.pending_warnings.append(text)

    def log_row(self, row: dict[str, Any], *, left_s: float) -> None:
        """Write a row, completed by peak memory and utilisation; warn where training waits for data."""
        if self._telemetry is None:
            return
        if warning := self._starvation.update(row):
            self.warn(warning)
        measured = self._meter.read(row["images_per_s"], crop_px=row["crop_px"])
        self._telemetry.write_row({**row, "peak_gib": peak_gib(self.config.device), **measured}, left_s=left_s)

    def step(self) -> None:
        """Advance the profiler after a step."""
        if self._profile is not None:
            self._profile.step()
