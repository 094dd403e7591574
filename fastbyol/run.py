"""Know one run as a whole: from a configuration, or a checkpoint, to a scored and exported encoder with its report."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from fastbyol import apex, checkpoint, optim, report, step
from fastbyol.beton import Reader
from fastbyol.budget import ClockPlan, StepPlan, Stopwatch, format_duration
from fastbyol.byol import BYOL
from fastbyol.config import Config, ConfigError
from fastbyol.evaluate import features, knn
from fastbyol.export import save_encoder
from fastbyol.loop import Loop
from fastbyol.runfolder import RunFolder, begin, check_resumable, check_unused, write_result
from fastbyol.telemetry import read_metrics

EXIT_S = 1.0  # from result.json to the end of the process, with room for a busy machine
OPTIMIZERS: dict[str, Callable[..., step.Optimizer]] = {"lars": optim.build, "apex-larc": apex.LARC}
RESERVE_MARGIN = 1.25  # of the closing work as measured before training; machines get busier


def run(config: Config, folder: RunFolder, *, resume: bool = False, overwrite: bool = False) -> bool:
    """Carry out a run in its folder; True when it finished, False when a signal stopped it and it can be resumed.

    The budget counts from the start of the process. Raises ConfigError, BetonError or CheckpointError for input that
    cannot be used, before anything is overwritten; OSError where the disk refuses; loop.Diverged.
    """
    with Reader(config.data) as train:
        if config.val is None:
            check_data(config, train, None)
            return _carry_out(config, folder, train, None, resume=resume, overwrite=overwrite)
        with Reader(config.val) as val:
            check_data(config, train, val)
            return _carry_out(config, folder, train, val, resume=resume, overwrite=overwrite)


def check_data(config: Config, train: Reader, val: Reader | None) -> None:
    """Raise ConfigError where the files do not serve the run."""
    batch = config.recipe.batch_size
    if batch > len(train):
        raise ConfigError(
            f"batch size {batch} exceeds the {len(train)} images of {train.path}; give a smaller --batch-size"
        )
    if val is not None:
        features.check_classes(train, val)


def _carry_out(
    config: Config, folder: RunFolder, train: Reader, val: Reader | None, *, resume: bool, overwrite: bool
) -> bool:
    if resume:
        check_resumable(folder, config)
        if folder.result.exists():
            print(f"{folder.path} has already finished", file=sys.stderr)
            return True
    else:
        check_unused(folder, overwrite=overwrite)
    this = Run(config, folder, train=train, val=val)
    if resume:
        this.take_up()
    if this.loop.position.progress < 1.0:
        plan = this.plan(this.rehearse())
        if not resume:
            begin(folder, config)
        if not this.fit(plan):
            return False
    this.finish()
    return True


class Run:
    """Hold what one run works with, and take it from its position to its result."""

    def __init__(self, config: Config, folder: RunFolder, *, train: Reader, val: Reader | None) -> None:
        self.config, self.folder, self.train, self.val = config, folder, train, val
        self.stopwatch = Stopwatch()
        recipe = config.recipe
        torch.backends.cudnn.benchmark = True  # shapes repeat for hours: cuDNN may time its algorithms
        self.model = BYOL(
            recipe.encoder,
            recipe.head,
            seed=config.seed,
            target_statistics=recipe.target_statistics,
            objective=recipe.objective,
        ).to(config.device)
        followed = {} if recipe.lagged_target else self.model.target_of()
        optimizer = OPTIMIZERS[config.optimizer](self.model, followed, recipe.optim)
        engine = step.engine(
            config.engine, self.model, optimizer, precision=config.precision, lagged_target=recipe.lagged_target
        )
        self.loop = Loop(config, reader=train, engine=engine, folder=folder)

    def take_up(self) -> None:
        """Continue from the newest checkpoint that reads; from the start if the run was stopped before its first.

        The clock takes up what earlier processes are known to have used: up to that checkpoint or the last row.
        """
        used_s = [row["elapsed_s"] for row in read_metrics(self.folder.metrics)[-1:]]
        if checkpoint.exists(self.folder.checkpoints):
            state, damaged = checkpoint.load_newest(self.folder.checkpoints)
            for line in damaged:
                print(f"warning: {line}", file=sys.stderr)
            self.loop.restore(state)
            used_s.append(state["elapsed_s"])
        self.stopwatch = Stopwatch(used_before_s=max(used_s, default=0.0))

    def rehearse(self) -> float:
        """Do the closing work once, in a folder of its own; return the seconds to reserve for it.

        It measures the reserve, scores the encoder as it starts, and lets a full disk fail now and not after the night,
        before anything of an earlier run is touched.
        """
        began_s = self.stopwatch.elapsed_s()
        score = self.knn_top1()
        if self.loop.position.step == 0:
            self.loop.notes = {"knn_top1_random_init": score}
        stage = RunFolder(self.folder.path / "rehearsal")
        try:
            checkpoint.save(stage.checkpoints, self.loop.state(elapsed_s=began_s), step=0)
            save_encoder(stage.encoder, self.model.online.encoder, self.config.recipe.encoder)
            rows = [dict.fromkeys(report.SERIES, 1.0 + number) for number in range(2)]
            result = {"images_per_s": 1.0, "epochs": 1.0, "train_s": 1.0, "knn_top1": score, **self.loop.notes}
            report.write(stage.report, self.config, train=self.train, rows=rows, result=result)
        finally:
            shutil.rmtree(stage.path, ignore_errors=True)
        return EXIT_S + RESERVE_MARGIN * (self.stopwatch.elapsed_s() - began_s)

    def fit(self, plan: StepPlan | ClockPlan) -> bool:
        """Train to the end of the plan: True; or to a signal: False. A run that ends early gets its report, too."""
        finished = False
        try:
            finished = self.loop.run(plan, self.stopwatch)
        finally:
            if not finished:
                self._report(None)
        return finished

    def _report(self, result: dict[str, Any] | None) -> None:
        rows = read_metrics(self.folder.metrics)
        report.write(self.folder.report, self.config, train=self.train, rows=rows, result=result)

    def plan(self, reserve_s: float) -> StepPlan | ClockPlan:
        """Plan the training: a number of steps, or the clock up to the budget less the reserve."""
        if self.config.budget_s is None:
            assert self.config.epochs is not None
            return StepPlan(max(math.ceil(self.config.epochs * len(self.train) / self.config.recipe.batch_size), 1))
        elapsed_s = self.stopwatch.elapsed_s()
        end_s = self.config.budget_s - reserve_s
        if end_s <= elapsed_s:
            raise ConfigError(
                f"a budget of {format_duration(self.config.budget_s)} leaves no time to train: "
                f"{elapsed_s:.0f} s are used and {reserve_s:.0f} s are needed to evaluate and save; "
                "give a longer --budget"
            )
        return ClockPlan(start_s=elapsed_s, end_s=end_s, start_progress=self.loop.position.progress)

    def knn_top1(self) -> float | None:
        """Score the online encoder with a bank of up to `knn_bank` training images; None without a validation file."""
        if self.val is None:
            return None
        recipe, workers = self.config.recipe, self.config.workers
        encoder, px, margin = self.model.online.encoder, recipe.eval_px, recipe.eval_margin
        bank = features.extract(
            encoder, self.train, eval_px=px, margin=margin, workers=workers, limit=self.config.knn_bank
        )
        queries = features.extract(encoder, self.val, eval_px=px, margin=margin, workers=workers)
        return knn.top1(bank, queries, k=min(knn.K, len(bank.labels)))

    def finish(self) -> None:
        """Export, score, and write result.json and the report."""
        save_encoder(self.folder.encoder, self.model.online.encoder, self.config.recipe.encoder)
        score, at = self.knn_top1(), self.loop.position
        images = at.step * self.config.recipe.batch_size
        result: dict[str, Any] = {
            "steps": at.step,
            "images": images,
            "epochs": images / len(self.train),
            "train_s": at.train_s,
            "images_per_s": images / at.train_s,
            "knn_top1": score,
            **self.loop.notes,
            "budget_s": self.config.budget_s,
        }
        self._report(result)
        elapsed_s = self.stopwatch.elapsed_s()
        result["elapsed_s"] = elapsed_s
        if self.config.budget_s is not None:
            result["overrun_s"] = max(elapsed_s - self.config.budget_s, 0.0)
        write_result(self.folder, result)
