"""Closing work after the last step: encoder, score, report and result, and the measured time of each piece."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch

from fastbyol import report
from fastbyol.batchnorm import recalibrate_
from fastbyol.beton import Reader
from fastbyol.config import Config
from fastbyol.evaluate import features, knn, neighbours
from fastbyol.evaluate.features import Features, OutOfTime
from fastbyol.evaluate.images import BATCH, InputSettings
from fastbyol.evaluate.neighbours import Neighbours
from fastbyol.evaluate.protocol import Files
from fastbyol.export import save_encoder
from fastbyol.monitor.metrics import Intervals, read_metrics
from fastbyol.storage import checkpoint
from fastbyol.storage.checkpoint import copy_to_host
from fastbyol.storage.run_folder import RunFolder, write_result
from fastbyol.train.loop import Loop

SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 5  # in the report


class Closing:
    """The closing work of a run and its rehearsal; `seconds` holds what each piece took last.

    scored: the labelled images by which kNN scores, its bank and those that are classified, if there are any.
    """

    def __init__(self, config: Config, folder: RunFolder, *, train: Reader, scored: Files | None, loop: Loop) -> None:
        self.config, self.folder, self.train, self.scored, self.loop = config, folder, train, scored, loop
        self.seconds: dict[str, float] = {}
        self.neighbours: list[Neighbours] = []

    @contextmanager
    def _timed(self, piece: str) -> Iterator[None]:
        threads = self.loop.threads
        began_s, lost_s = time.monotonic(), threads.lost_s
        yield
        self.seconds[piece] = max(time.monotonic() - began_s - (threads.lost_s - lost_s), 0.0)

    def rehearse(self) -> None:
        """Do all closing work once, in a folder of its own, before anything of an earlier run is overwritten.

        This measures the time to reserve, scores the encoder before training, and makes a full disk fail now and not
        after hours of training.
        """
        loop, cost = self.loop, self.loop.saver.cost
        self._warm_up()
        score = self.knn_top1()
        if loop.position.step == 0:
            loop.notes["knn_top1_random_init" if self.config.init is None else "knn_top1_at_start"] = score
        rehearsal = self.folder.rehearsal
        try:
            with self._timed("checkpoint"):
                began_s = time.monotonic()
                taken = copy_to_host(loop.state(with_momenta=True))
                if self.config.device == "cuda":
                    torch.cuda.synchronize()  # the copies are only queued
                cost.copy_s = time.monotonic() - began_s
                checkpoint.save(rehearsal.checkpoints, taken, step=0)
                cost.write_s = time.monotonic() - began_s - cost.copy_s
            self._export(rehearsal)
            rows = [dict.fromkeys(report.SERIES, 1.0 + number) for number in range(2)]
            result = {"images_per_s": 1.0, "epochs": 1.0, "train_s": 1.0, "knn_top1": score, **loop.notes}
            self.report(result, folder=rehearsal, rows=rows)
            self._write_result(rehearsal, result)
        finally:
            shutil.rmtree(rehearsal.path, ignore_errors=True)

    def _warm_up(self) -> None:
        """Evaluate one batch: the first compiles and chooses algorithms, which must not count as closing work."""
        if self.scored is not None:
            self._extract(self.scored[1], limit=BATCH)

    def _export(self, folder: RunFolder) -> None:
        with self._timed("export"):
            save_encoder(folder.encoder, self.loop.model.online.encoder, self.config.recipe.encoder)

    def _write_result(self, folder: RunFolder, result: dict[str, Any]) -> None:
        with self._timed("result"):
            write_result(folder, result)

    def report(
        self,
        result: dict[str, Any] | None,
        *,
        folder: RunFolder | None = None,
        rows: list[dict[str, Any]] | None = None,
    ) -> None:
        """Write the report, from the run's rows unless `rows` are given."""
        to = folder or self.folder
        with self._timed("report"):
            rows = read_metrics(self.folder.metrics) if rows is None else rows
            report.write(
                to.report,
                self.config,
                train=self.train,
                scored=self.scored,
                rows=rows,
                result=result,
                neighbours=self.neighbours,
                plan=self.loop.notes.get("plan"),
                warnings=self.loop.logger.pending_warnings,
            )

    def knn_top1(self, stop: Callable[[], bool] | None = None) -> float | None:
        """Return the online encoder's kNN top-1 in percent, with up to `knn_bank` images as the bank.

        Training state does not change. None without a validation file, or when `stop` returns True before the end.
        """
        if self.scored is None:
            return None
        bank_file, val = self.scored
        with self._timed("evaluate"):
            try:
                bank = self._extract(bank_file, limit=self.config.knn_bank, stop=stop)
                queries = self._extract(val, stop=stop)
            except OutOfTime:
                return None
            self.neighbours = neighbours.pick(
                bank, queries, rows=SHOWN_QUERIES, k=SHOWN_NEIGHBOURS, bank_images=len(bank_file)
            )
            return knn.top1(bank, queries, k=min(knn.K, len(bank.labels)), device=self.config.device)

    def _extract(self, reader: Reader, *, limit: int | None = None, stop: Callable[[], bool] | None = None) -> Features:
        """Compute the online encoder's representations of a file's images."""
        config, recipe = self.config, self.config.recipe
        inputs = InputSettings(
            recipe.eval_px, recipe.eval_margin, config.workers, config.device, config.on_error, self.loop.threads
        )
        chosen = features.evenly_spaced(len(reader), limit)
        return features.represent(self.loop.model.online.encoder, reader, chosen, inputs, stop=stop)

    def recalibrate(self) -> None:
        """Recompute the encoder's running statistics on the recipe's number of batches, with views of full size."""
        loop, recipe = self.loop, self.config.recipe
        if not recipe.recalibrate:
            return
        with self._timed("recalibrate"), closing(loop.pipeline.batches(loop.position.step)) as batches:
            views = (
                part
                for batch in islice(batches, recipe.recalibrate)
                for part in loop.pipeline.views(batch, recipe.crop_px, Intervals())
            )
            recalibrate_(loop.model.online.encoder, views, autocast=loop.engine.autocast())

    def _is_past(self, time_s: float) -> bool:
        return self.loop.stopwatch.elapsed_s() > time_s

    def finish(self, *, deadline_s: float | None, score_until_s: float) -> None:
        """Export and score the encoder, write report and result.json; give up the score after `score_until_s`."""
        loop, at = self.loop, self.loop.position
        self.recalibrate()
        self._export(self.folder)
        score = self.knn_top1(partial(self._is_past, score_until_s))
        if score is None and self.scored is not None:
            loop.logger.warn("no time was left to score the encoder; fastbyol-eval knn does")
        images = at.step * self.config.recipe.batch_size
        result: dict[str, Any] = {
            "steps": at.step,
            "images": images,
            "epochs": images / len(self.train),
            "progress": at.progress,
            "train_s": at.train_s,
            "images_per_s": images / at.train_s,
            "knn_top1": score,
            "skipped_steps": int(loop.optimizer.skipped[0]),
            "skipped_samples": loop.skipped_samples,
            **loop.notes,
            "budget_s": deadline_s,
        }
        result["elapsed_s"] = loop.stopwatch.elapsed_s()
        self.report(result)
        result["elapsed_s"] = elapsed_s = loop.stopwatch.elapsed_s()
        if deadline_s is not None:
            result["overrun_s"] = max(elapsed_s - deadline_s, 0.0)
        self._write_result(self.folder, result)
