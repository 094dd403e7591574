"""Scores of the encoder within its run: kNN on labelled images, and measures that need no labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.config import Config
from fastbyol.evaluate import features, knn, neighbours, quality
from fastbyol.evaluate.features import Features, OutOfTime, evenly_spaced
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.neighbours import Neighbours
from fastbyol.evaluate.protocol import Files
from fastbyol.evaluate.quality import Quality
from fastbyol.evaluate.raw_pixels import RawPixels
from fastbyol.model.parts import Encoder
from fastbyol.system.threads import ThreadTuner

SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 5  # in the report
RAW_QUERIES = 2000  # their vectors are ten times as long as an encoder's, and so is the search for neighbours
PER_FEATURE, MEASURED_MIN, MEASURED_MAX = 4, 512, 2048  # images for the measures without labels
PAIRS = 256  # images in two crops for the alignment; all are at most the forwards of 320 images of a step
BASELINES = ("random init", "at start", "raw pixels")  # of kNN; "at start": of weights that the run started from
MEASURES = ("rankme", "effective_rank", "alignment", "uniformity")  # of Quality, in a row of metrics.jsonl

Stop = Callable[[], bool]
Scores = dict[str, float]  # "knn_top1" with a validation file, and MEASURES; without what was given up


class Scorer:
    """The scores of one encoder in the midst of its training, which they do not change.

    scored: the labelled images by which kNN scores, its bank and those that are classified, if there are any; the
    measures are of the bank or, without one, of the training images. neighbours: those that the last score found, of
    the samples of `files`. warn: is told where the representations cannot be measured.
    """

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        *,
        train: Reader,
        scored: Files | None,
        threads: ThreadTuner,
        warn: Callable[[str], None],
    ) -> None:
        recipe = config.recipe
        self.config, self.encoder, self.scored, self._warn = config, encoder, scored, warn
        self.inputs = InputSettings(
            recipe.eval_px, recipe.eval_margin, config.workers, config.device, config.on_error, threads
        )
        self.files: Files = (train, train) if scored is None else scored
        self.neighbours: list[Neighbours] = []

    @property
    def measured(self) -> int:
        """The number of images for the measures without labels, at most: ranks settle at some times the features."""
        return min(max(PER_FEATURE * self.encoder.features, MEASURED_MIN), MEASURED_MAX)

    def warm_up(self) -> None:
        """Evaluate one batch and measure: the first compiles and chooses algorithms, which later ones do not."""
        queries = self.files[1]
        some = evenly_spaced(len(queries), self.inputs.batch)
        features.represent_unlabelled(self.encoder, queries, some, self.inputs)
        small = torch.eye(4, device=self.config.device)
        quality.measure(small, (small, small), spectrum=quality.roots_of_gram)

    def score(self, stop: Stop | None = None) -> Scores:
        """Return the scores, as far as they are known before `stop` returns True."""
        found: Scores = {}
        try:
            if self.scored is None:
                samples = evenly_spaced(len(self.files[0]), self.measured)
                values = features.represent_unlabelled(self.encoder, self.files[0], samples, self.inputs, stop=stop)
                self.neighbours = neighbours.pick_without_labels(
                    values, samples, rows=SHOWN_QUERIES, k=SHOWN_NEIGHBOURS
                )
            else:
                found["knn_top1"], values = self._knn(self.scored, stop)
            return found | self._measures(values, stop)
        except OutOfTime:
            return found

    def _knn(self, scored: Files, stop: Stop | None) -> tuple[float, Tensor]:
        """Return kNN top-1 in percent, with up to `knn_bank` images as the bank, and representations of the bank."""
        bank, queries = self._represent(self.encoder, scored, queries=None, stop=stop)
        self.neighbours = neighbours.pick(
            bank, queries, rows=SHOWN_QUERIES, k=SHOWN_NEIGHBOURS, bank_images=len(scored[0])
        )
        return self._top1(bank, queries), bank.values[torch.from_numpy(evenly_spaced(len(bank.values), self.measured))]

    def raw_pixels_top1(self) -> float | None:
        """Return the kNN top-1 in percent of the images' own pixels, on some of the validation images."""
        if self.scored is None:
            return None
        encoder = RawPixels(self.config.recipe.eval_px)
        return self._top1(*self._represent(encoder, self.scored, queries=RAW_QUERIES))

    def _represent(
        self, encoder: Encoder, scored: Files, *, queries: int | None, stop: Stop | None = None
    ) -> tuple[Features, Features]:
        """Compute an encoder's representations of the bank and of the images that are classified, `queries` at most."""
        bank, asked = (
            features.represent(encoder, reader, evenly_spaced(len(reader), limit), self.inputs, stop=stop)
            for reader, limit in zip(scored, (self.config.knn_bank, queries), strict=True)
        )
        return bank, asked

    def _top1(self, bank: Features, queries: Features) -> float:
        return knn.top1(bank, queries, k=min(knn.K, len(bank.labels)), device=self.config.device)

    def _measures(self, values: Tensor, stop: Stop | None) -> Scores:
        if len(values) < 2:
            return {}
        if not bool(values.isfinite().all()):
            self._warn("the representations hold NaN or inf: they are not measured")
            return {}
        if quality.has_collapsed(values):
            found = Quality(1.0, 1.0, 0.0, 0.0, len(values))
        else:
            pairs = self._pairs(stop)
            found = quality.measure(values.to(self.config.device), pairs, spectrum=quality.roots_of_gram)
        return {name: getattr(found, name) for name in MEASURES}

    def _pairs(self, stop: Stop | None) -> tuple[Tensor, Tensor]:
        reader = self.files[0]
        chosen: NDArray[np.int64] = evenly_spaced(len(reader), PAIRS)
        return quality.represent_pairs(
            self.encoder, reader, chosen, self.inputs, seed=self.config.seed, label="crops", stop=stop
        )
