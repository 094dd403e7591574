"""One run as a whole: from a configuration or a checkpoint to a scored and exported encoder with a report."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch

from fastbyol.budget import Stopwatch
from fastbyol.config import Config, to_json
from fastbyol.model.byol import BYOL
from fastbyol.model.parts import build_optimizer
from fastbyol.monitor.metrics import read_metrics
from fastbyol.monitor.watchdog import Diverged
from fastbyol.storage import checkpoint, files
from fastbyol.storage.run_folder import RunFolder, initialize, set_aside
from fastbyol.system.device import make_deterministic
from fastbyol.system.signals import StopSignal
from fastbyol.train import memory, micro_batches, start, step
from fastbyol.train.finish import Closing
from fastbyol.train.gradients import check_gradients
from fastbyol.train.lengthen import lengthen
from fastbyol.train.loop import Loop
from fastbyol.train.opening import OpenRun, open_run
from fastbyol.train.planning import Planner


def run(
    config: Config,
    folder: RunFolder,
    *,
    stopwatch: Stopwatch,
    stop: StopSignal,
    resume: bool = False,
    overwrite: bool = False,
) -> bool:
    """Run a configuration in its folder; return True when finished, False when a signal stopped it (resumable).

    stopwatch: counts the seconds of the budget; stop: receives the signals. Under torchrun every rank calls this
    function. With `resume`, a run is started if the folder holds none, and one that has finished goes on if the
    configuration is longer. Whenever the GPU runs out of memory, the newest checkpoint is resumed in smaller
    micro-batches. Raises ConfigError, BetonError or CheckpointError for unusable input, before anything is overwritten;
    OSError from the disk; watchdog.Diverged; distributed.RankLost.
    """
    with open_run(config, folder, stopwatch=stopwatch, resume=resume, overwrite=overwrite) as opened:
        if opened.state == "finished":
            return True
        chosen, has_started = opened.config, opened.state == "started"
        used_before_s: float | None = None
        change = ""  # of how a step is computed
        while True:
            attempt: Run | None = None
            try:
                attempt = Run(chosen, opened, stopwatch=stopwatch, stop=stop)
                if has_started:
                    attempt.resume(used_before_s)
                    attempt.drop_damaged()
                    if opened.world.is_main and folder.result.exists():  # it had finished, and is longer now
                        set_aside(folder, step=attempt.loop.position.step)
                    if opened.world.is_main and folder.read_config() != chosen:  # the images are known to be the same
                        files.write(folder.config, to_json(chosen))
                else:
                    attempt.begin()
                    chosen = attempt.config
                if change:
                    attempt.record_micro_batches(change)
                is_finished = attempt.execute(is_new=not has_started)
                break
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                failure = " ".join(str(error).partition("\n")[0].split())
            if attempt is not None and attempt.has_started:  # once started, a run is not begun anew
                has_started, used_before_s = True, attempt.used_before_s
            del attempt  # and all that it holds on the GPU
            images = micro_batches.images_of_rank(chosen, opened.train, opened.world)
            chosen, change = micro_batches.split_further(
                config, chosen, images=images, ranks=opened.world.ranks, failure=failure
            )
            if has_started:
                files.write(folder.config, to_json(chosen))
        opened.world.from_main(None)  # rank 0 may still be doing its closing work
        return is_finished


class Run:
    """One attempt at a run: its model, optimiser and loop, taken from its position to its result."""

    def __init__(self, config: Config, opened: OpenRun, *, stopwatch: Stopwatch, stop: StopSignal) -> None:
        _, folder, train, scored, world, _ = opened
        self.config, self.folder, self.world, self.stopwatch = config, folder, world, stopwatch
        recipe = config.recipe
        torch.backends.cudnn.benchmark = not config.deterministic  # shapes repeat for hours, so cuDNN's search pays
        if config.deterministic:
            make_deterministic()
        self.model = BYOL(
            recipe.encoder,
            recipe.head,
            seed=config.seed,
            views=len(recipe.global_views),
            target_statistics=recipe.target_statistics,
            objective=recipe.objective,
        ).to(config.device)
        self.model.online.encoder.set_recompute(config.recomputes)
        target_of = {} if recipe.lagged_target else self.model.target_of()
        optimizer = build_optimizer(recipe.optim.optimizer, self.model, target_of, recipe.optim)
        engine = step.engine(
            config.engine, self.model, optimizer, precision=config.precision, lagged_target=recipe.lagged_target
        )
        check_gradients(engine, recipe, ranks=world.ranks)
        if world.group is not None:
            engine.distribute(world.group)
        self.loop = Loop(
            config, reader=train, engine=engine, folder=folder, world=world, stopwatch=stopwatch, stop=stop
        )
        self.closing = Closing(config, folder, train=train, scored=scored, loop=self.loop)
        self.epochs: float | None = None  # for which an earlier process built the schedules
        self.used_before_s = 0.0  # by earlier processes
        self.has_started = False  # the folder belongs to this run
        self.has_damaged = False  # checkpoints, which resume() passed over; known on rank 0

    def begin(self) -> None:
        """Load the weights that the run starts from, if it does not start from drawn ones; rank 0 reads them."""
        if self.config.init is None:
            return
        weights = self.world.from_main(start.read_start(self.config) if self.world.is_main else None)
        line = start.start_(self.model, weights)
        self.config = replace(self.config, init_digest=weights.digest)
        if self.world.is_main:
            print(line, file=sys.stderr)

    def resume(self, used_before_s: float | None = None) -> None:
        """Restore the newest readable checkpoint and make the run longer if it is; without a checkpoint, begin.

        Nothing in the folder changes.

        Rank 0 reads it for all ranks. The stopwatch adds the seconds that earlier processes are known to have used, up
        to that checkpoint or the last row. used_before_s: those seconds, if the stopwatch has counted them already.
        """
        used_s = [row["elapsed_s"] + row.get("score_s", 0.0) for row in read_metrics(self.folder.metrics)[-1:]]
        if self.folder.result.exists():  # it had finished
            used_s.append(self.folder.read_result()["elapsed_s"])
        state: dict[str, Any] | None = None
        damaged: list[str] = []
        if self.world.is_main and checkpoint.exists(self.folder.checkpoints):
            state, damaged = checkpoint.load_newest(self.folder.checkpoints)
        state = self.world.from_main(state)
        if state is not None:
            try:
                self.loop.restore(state)
            except KeyError as error:
                raise checkpoint.CheckpointError(
                    f"{self.folder.checkpoints} holds no state of a run (no {error}); give --overwrite to start anew"
                ) from error
            self.epochs = state["epochs"]
            used_s.append(state["elapsed_s"])
        else:
            self.begin()
        for line in damaged:
            self.loop.logger.warn(line)
        self.has_damaged = bool(damaged)
        self.has_started = True
        self.used_before_s = max(used_s, default=0.0) if used_before_s is None else used_before_s
        if used_before_s is None:
            self.stopwatch.add_earlier(self.used_before_s)
        deadline_s = self.world.from_main(self.config.end_s(self.stopwatch.elapsed_at))
        if state is not None and lengthen(self.loop, epochs=self.epochs, deadline_s=deadline_s):
            self.epochs = None

    def drop_damaged(self) -> None:
        """Remove the checkpoints that did not load: they would count against the good one before them."""
        if self.has_damaged:
            checkpoint.drop_after(self.folder.checkpoints, self.loop.position.step)

    def record_micro_batches(self, line: str) -> None:
        """Warn how a step is computed since memory ran out, and record from which step on in the result."""
        self.loop.logger.warn(line)
        self.loop.notes.setdefault("micro_batches_from_step", []).append([self.loop.position.step, self.config.parts])

    def execute(self, *, is_new: bool) -> bool:
        """Plan, train and do the closing work; return True when finished, False when a signal came first.

        A run that ends early, by a signal or because it diverges, leaves its report.
        """
        deadline_s, score_until_s = self.config.end_s(self.stopwatch.elapsed_at), math.inf
        if self.loop.position.progress < 1.0:
            planner = Planner(self.loop, self.closing, epochs=self.epochs, used_before_s=self.used_before_s)
            planned = planner.plan(deadline_s)
            if planned is not None:
                if is_new and self.world.is_main:
                    initialize(self.folder, self.config)
                self.has_started = True
                plan, schedules = planned
                try:
                    is_at_end = self.loop.run(plan, schedules, score=self.closing.score)
                except Diverged:
                    self._report_unfinished()
                    raise
                if not is_at_end:
                    self._report_unfinished()
                    return False
                score_until_s = plan.score_until_s
        self.loop.engine.release()
        if self.world.is_main:
            self.closing.finish(deadline_s=deadline_s, score_until_s=score_until_s)
        return True

    def _report_unfinished(self) -> None:
        """Write the report of an unfinished run; all ranks wait for it, so that none is taken for lost."""
        if self.world.is_main:
            try:
                self.closing.report(None)
            except OSError as error:
                self.loop.logger.warn(f"the report could not be written: {error}")
        self.world.from_main(None)
