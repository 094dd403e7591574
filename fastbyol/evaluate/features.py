"""Know how to turn a labelled beton into frozen representations, each image seen once, whole, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastbyol.beton import Reader
from fastbyol.config import ConfigError, require
from fastbyol.encoder import ResNet
from fastbyol.evaluate.images import Lens, centred

CLASSES_MAX = 65_536  # more would be a mistake, and a large one in memory
NAMED_MAX = 5  # classes that a message lists
ROWS = 1 << 14  # checked at a time, since isfinite makes copies of what it checks


class OutOfTime(Exception):
    """Tell that a budget ended before a score was reached."""


class Features(NamedTuple):
    """Pair representations, float32 [N, F], with labels, int64 [N]."""

    values: Tensor
    labels: Tensor

    def rows(self, indices: NDArray[np.int64]) -> Features:
        """Take some of them."""
        chosen = torch.from_numpy(indices)
        return Features(self.values[chosen], self.labels[chosen])


def check_classes(train: Reader, val: Reader) -> None:
    """Raise ConfigError unless both files are labelled, with the same classes, and train holds all those of val."""
    for reader in (train, val):
        labels = labels_of(reader)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= CLASSES_MAX:
            raise ConfigError(f"{reader.path} has labels from {low} to {high}; scoring needs 0 to {CLASSES_MAX - 1}")
    if len(train) < 2:
        raise ConfigError(f"{train.path} holds one image; scoring needs at least 2 to learn from")
    names = {tuple(reader.class_names) for reader in (train, val) if reader.class_names is not None}
    if len(names) > 1:
        raise ConfigError(f"{train.path} and {val.path} name different classes; write both from the same class folders")
    absent = np.setdiff1d(labels_of(val), labels_of(train))
    if len(absent):
        told = ", ".join(map(str, absent[:NAMED_MAX])) + (", ..." if len(absent) > NAMED_MAX else "")
        raise ConfigError(
            f"{val.path} has {len(absent)} classes that {train.path} has no image of (labels {told}); "
            "write both from the same class folders, val with --classes-from"
        )


def labels_of(reader: Reader) -> NDArray[np.int64]:
    """Return the labels of a beton; raise ConfigError when it has none."""
    if reader.labels is None:
        raise ConfigError(
            f"{reader.path} has no labels, and scoring needs those of both files; write it from class folders"
        )
    return reader.labels


def check(features: Features, name: object) -> None:
    """Raise ConfigError unless each representation has a label, a class number, and is finite."""
    values, labels = features
    require(
        len(values) == len(labels) > 0,
        f"{name} gives {len(values)} representations and {len(labels)} labels; give one label for each",
    )
    low = int(labels.min())
    require(low >= 0, f"{name} has a label {low}; give class numbers from 0")
    whole = sum(int(rows.isfinite().all(1).sum()) for rows in torch.split(values, ROWS))
    broken = len(values) - whole
    require(
        broken == 0,
        f"the representations of {name} hold NaN or inf in {broken} of {len(values)} images; "
        "the encoder has diverged: train it again, with a smaller --base-lr",
    )


def spread(count: int, limit: int | None) -> NDArray[np.int64]:
    """Choose `limit` of `count` positions, or all, evenly spread: int64, rising."""
    taken = count if limit is None else min(limit, count)
    return np.arange(taken, dtype=np.int64) * count // taken


def extract(
    encoder: ResNet,
    reader: Reader,
    *,
    eval_px: int,
    margin: float,
    workers: int,
    on_error: str = "fail",
    limit: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Features:
    """Represent labelled images by the encoder, on the encoder's device; all of them, or `limit` spread over the file.

    Views are centre squares of share `margin` of the short side, resampled to eval_px. The encoder is left in the
    mode it came in; its batch-norm statistics are not touched. `stop` is asked before each batch, and OutOfTime raised
    where it says True. `on_error`: of an image that does not decode, see Lens. Raises ConfigError when the file has no
    labels.
    """
    lens = Lens(eval_px, margin, workers, encoder.conv1.weight.device.type, on_error)
    return represent(encoder, reader, spread(len(reader), limit), lens, stop=stop)


@torch.inference_mode()
def represent(
    encoder: ResNet,
    reader: Reader,
    indices: NDArray[np.int64],
    lens: Lens,
    *,
    stop: Callable[[], bool] | None = None,
) -> Features:
    """Do as `extract` for the images named, in that order; a label is that of the image seen, a stand-in's too."""
    known, labels = torch.from_numpy(labels_of(reader)), torch.empty(len(indices), dtype=torch.int64)
    values = torch.empty(len(indices), encoder.features)
    was_training, done = encoder.training, 0
    bar = tqdm(total=len(indices), desc=reader.path.name, unit="images", delay=2, leave=False, disable=None)
    encoder.eval()
    try:
        with bar, lens.precision():
            for images, here in lens.threads.units(centred(reader, indices, lens), "represent"):
                if stop is not None and stop():
                    raise OutOfTime(f"time ran out after {done} of the {len(indices)} images of {reader.path}")
                values[done : done + len(here)] = encoder(images)[: len(here)]
                labels[done : done + len(here)] = known[torch.from_numpy(here)]
                done += len(here)
                bar.update(len(here))
    finally:
        encoder.train(was_training)
    return Features(values, labels)
