"""Closing work after the last step: encoder, score, report and result, and the measured time of each piece."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastbyol import report
from fastbyol.beton import Reader
from fastbyol.budget import TimeLimit
from fastbyol.config import Config
from fastbyol.evaluate.protocol import Files
from fastbyol.export import save_encoder
from fastbyol.model.batchnorm import recalibrate_
from fastbyol.monitor.metrics import Intervals, read_metrics
from fastbyol.storage import checkpoint
from fastbyol.storage.checkpoint import copy_to_host
from fastbyol.storage.maps import links, read_maps
from fastbyol.storage.run_folder import RunFolder, write_result
from fastbyol.train.loop import Loop
from fastbyol.train.probe import recent_top1
from fastbyol.train.scoring import MEASURES, Scorer, Scores, Stop


class Closing:
    """The closing work of a run and its rehearsal; `seconds` holds what each piece took last.

    scored: the labelled images by which kNN scores, its bank and those that are classified, if there are any. measures:
    those without labels of the last score. bytes: of what the rehearsal wrote, by its name in the run folder.
    """

    def __init__(self, config: Config, folder: RunFolder, *, train: Reader, scored: Files | None, loop: Loop) -> None:
        self.config, self.folder, self.train, self.scored, self.loop = config, folder, train, scored, loop
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.measures: dict[str, float] = {}
        self.scorer = Scorer(
            config,
            loop.model.online.encoder,
            train=train,
            scored=scored,
            threads=loop.threads,
            warn=loop.logger.warn,
        )

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
        self.scorer.warm_up()
        scores = self.score()
        if loop.position.step == 0:
            start = self._start.replace(" ", "_")
            loop.notes |= {f"knn_top1_{start}": scores.get("knn_top1"), f"quality_{start}": self.measures}
            loop.notes["knn_top1_raw_pixels"] = self.scorer.raw_pixels_top1()
            loop.initial_scores = scores
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
            result = {"images_per_s": 1.0, "epochs": 1.0, "train_s": 1.0, **scores, **loop.notes}
            self.report(result, folder=rehearsal, rows=rows)
            self._write_result(rehearsal, result)
            self.bytes = {path.name: _bytes(path) for path in rehearsal.path.iterdir()}
        finally:
            shutil.rmtree(rehearsal.path, ignore_errors=True)

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
                rows=rows,
                result=result,
                scored=self.scorer.files,
                neighbours=self.scorer.neighbours,
                measures=self._known_measures(is_finished=result is not None),
                maps=links(to, read_maps(self.folder)),
                plan=self.loop.notes.get("plan"),
                warnings=self.loop.logger.pending_warnings,
            )

    @property
    def _start(self) -> str:
        """What the encoder was before the first step, in words."""
        return "random init" if self.config.init is None else "at start"

    def _known_measures(self, *, is_finished: bool) -> dict[str, dict[str, float]]:
        """Return the measures without labels of the initial encoder and those of the last score, as far as known."""
        first, last = self.loop.notes.get(f"quality_{self._start.replace(' ', '_')}") or {}, self.measures
        known = {self._start: first, "trained" if is_finished else "last measured": last}
        return {title: measures for title, measures in known.items() if measures and (is_finished or last != first)}

    def score(self, stop: Stop | None = None) -> Scores:
        """Score the online encoder; see Scorer.score."""
        with self._timed("evaluate"):
            scores = self.scorer.score(stop)
        self.measures = {name: scores[name] for name in MEASURES if name in scores}
        return scores

    def recalibrate(self) -> None:
        """Recompute the encoder's running statistics on the recipe's number of batches, with views of full size."""
        loop, recipe = self.loop, self.config.recipe
        if not recipe.recalibrate:
            return
        with self._timed("recalibrate"), closing(loop.pipeline.batches(loop.position.step)) as batches:
            views = (
                global_views
                for batch in islice(batches, recipe.recalibrate)
                for global_views, *_ in loop.pipeline.views(batch, recipe.crop_px, Intervals())
            )
            recalibrate_(loop.model.online.encoder, views, autocast=loop.engine.autocast())

    def finish(self, *, deadline_s: float | None, score_until_s: float) -> None:
        """Export and score the encoder, write report and result.json; give up a score that would end too late."""
        loop, at = self.loop, self.loop.position
        self.recalibrate()
        self._export(self.folder)
        limit = TimeLimit(loop.stopwatch, score_until_s)
        scores = self.score(limit)
        if limit.was_reached:
            is_known, protocol = bool(scores), "knn" if self.scored and not scores else "quality"
            what = "measure the encoder without labels" if is_known else "score the encoder"
            loop.logger.warn(f"no time was left to {what}; fastbyol-eval {protocol} does")
        loop.logger.extend_last_row(scores)
        rows = read_metrics(self.folder.metrics)
        images = at.step * self.config.recipe.batch_size
        result: dict[str, Any] = {
            "steps": at.step,
            "images": images,
            "epochs": images / len(self.train),
            "progress": at.progress,
            "train_s": at.train_s,
            "images_per_s": images / at.train_s,
            "knn_top1": scores.get("knn_top1"),
            "probe_top1": recent_top1(rows),
            "quality": self.measures,
            "skipped_steps": int(loop.optimizer.skipped[0]),
            "skipped_samples": loop.skipped_samples,
            **loop.notes,
            "budget_s": deadline_s,
        }
        result["elapsed_s"] = loop.stopwatch.elapsed_s()
        self.report(result, rows=rows)
        result["elapsed_s"] = elapsed_s = loop.stopwatch.elapsed_s()
        if deadline_s is not None:
            result["overrun_s"] = max(elapsed_s - deadline_s, 0.0)
        self._write_result(self.folder, result)


def _bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in paths if each.is_file())
