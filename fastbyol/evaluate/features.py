"""Frozen representations of a .beton: one centre view per image, encoder in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import UNLABELLED, Reader
from fastbyol.errors import ConfigError, require
from fastbyol.evaluate.images import InputSettings, center_views
from fastbyol.model.parts import Encoder
from fastbyol.system.progress import Progress
from fastbyol.system.shell import quoted

CLASSES_MAX = 65_536  # a larger label is a mistake, and would cost much memory
LISTED_MAX = 5  # classes that a message lists
ROWS = 1 << 14  # checked at a time, since isfinite makes copies of what it checks
Take = Callable[[Tensor, NDArray[np.int64], int], None]  # values [n, F], their samples [n], the entries before them


class OutOfTime(Exception):
    """A budget that ended before the score was known."""


class Features(NamedTuple):
    """Representations, float32 [N, F], and their labels, int64 [N]."""

    values: Tensor
    labels: Tensor

    def rows(self, indices: NDArray[np.int64]) -> Features:
        """Select the rows at these indices."""
        chosen = torch.from_numpy(indices)
        return Features(self.values[chosen], self.labels[chosen])


def check_classes(train: Reader, val: Reader) -> None:
    """Raise ConfigError unless both files are labelled with the same classes and train holds every class of val."""
    for reader in (train, val):
        labels = labels_of(reader)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= CLASSES_MAX:
            raise ConfigError(
                f"{reader.path} has labels from {low} to {high}; scoring needs 0 to {CLASSES_MAX - 1}; write it again"
            )
    if len(train) < 2:
        raise ConfigError(f"{train.path} holds one image; scoring needs at least 2; give a larger training file")
    names = {tuple(reader.class_names) for reader in (train, val) if reader.class_names is not None}
    if len(names) > 1:
        raise ConfigError(
            f"{train.path} and {val.path} name different classes; give a --val written by fastbyol-prep "
            f"write --classes-from {quoted(train.path)}"
        )
    absent = np.setdiff1d(labels_of(val), labels_of(train))
    if len(absent):
        listed = ", ".join(map(str, absent[:LISTED_MAX])) + (", ..." if len(absent) > LISTED_MAX else "")
        raise ConfigError(
            f"{val.path} has {len(absent)} classes that {train.path} has no image of (labels {listed}); "
            "write both from the same class folders, val with --classes-from"
        )


def labels_of(reader: Reader) -> NDArray[np.int64]:
    """Return the labels of a beton; raise ConfigError when it has none."""
    if reader.labels is None or (reader.labels == UNLABELLED).all():
        raise ConfigError(
            f"{reader.path} has no labels; scoring needs labels in both files; write it from class folders, or give "
            "fastbyol-train other images with --labelled, and fastbyol-eval with --train"
        )
    return reader.labels


def check_features(features: Features, name: object) -> None:
    """Raise ConfigError unless every representation is finite and has a label of at least 0."""
    values, labels = features
    require(
        len(values) == len(labels) > 0,
        f"{name} gives {len(values)} representations and {len(labels)} labels; give one label per representation",
    )
    low = int(labels.min())
    require(low >= 0, f"{name} has a label {low}; give class numbers from 0")
    finite = sum(int(rows.isfinite().all(1).sum()) for rows in torch.split(values, ROWS))
    broken = len(values) - finite
    require(
        broken == 0,
        f"the representations of {name} hold NaN or inf in {broken} of {len(values)} images; "
        "the encoder has diverged: train it again, with a smaller --base-lr",
    )


def evenly_spaced(count: int, limit: int | None) -> NDArray[np.int64]:
    """Choose `limit` evenly spaced positions out of `count`, or all of them: int64, ascending."""
    taken = count if limit is None else min(limit, count)
    return np.arange(taken, dtype=np.int64) * count // taken


def extract(
    encoder: Encoder,
    reader: Reader,
    *,
    eval_px: int,
    margin: float,
    workers: int,
    on_error: str = "fail",
    limit: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Features:
    """Compute representations of all labelled images, or of `limit` evenly spaced ones, on the encoder's device.

    A view is the centre square whose side is `margin` times the short side, resampled to `eval_px`. The encoder
    keeps its mode and its batch-norm statistics. `stop` is called before each batch; when it returns True, OutOfTime is
    raised. `on_error` handles an image that does not decode, see InputSettings. Raises ConfigError if the file has no
    labels; of one that has some, give its `labelled()` part.
    """
    inputs = InputSettings(eval_px, margin, workers, next(encoder.parameters()).device.type, on_error)
    return represent(encoder, reader, evenly_spaced(len(reader), limit), inputs, stop=stop)


def represent(
    encoder: Encoder,
    reader: Reader,
    indices: NDArray[np.int64],
    inputs: InputSettings,
    *,
    stop: Callable[[], bool] | None = None,
) -> Features:
    """Compute representations of the images at `indices`, in that order, with their labels; see `extract`.

    Where a stand-in replaces an image that does not decode, the label is the stand-in's.
    """
    known, labels = torch.from_numpy(labels_of(reader)), torch.empty(len(indices), dtype=torch.int64)
    values = torch.empty(len(indices), encoder.features)

    def take(found: Tensor, images: NDArray[np.int64], done: int) -> None:
        values[done : done + len(images)] = found
        labels[done : done + len(images)] = known[torch.from_numpy(images)]

    stream(encoder, reader, indices, inputs, take=take, stop=stop)
    return Features(values, labels)


def represent_unlabelled(
    encoder: Encoder,
    reader: Reader,
    indices: NDArray[np.int64],
    inputs: InputSettings,
    *,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Compute representations [N, F] of the images at `indices`, in that order; see `extract`."""
    values = torch.empty(len(indices), encoder.features)

    def take(found: Tensor, _: NDArray[np.int64], done: int) -> None:
        values[done : done + len(found)] = found

    stream(encoder, reader, indices, inputs, take=take, stop=stop)
    return values


@torch.inference_mode()
def stream(
    encoder: Encoder,
    reader: Reader,
    indices: NDArray[np.int64],
    inputs: InputSettings,
    *,
    take: Take,
    stop: Callable[[], bool] | None = None,
    done: int = 0,
) -> None:
    """Compute representations of the images at `indices` from entry `done` on, and hand each batch to `take`.

    Labels are not needed. An image that does not decode comes as its stand-in, whose index is told. `stop` is called
    before each batch; when it returns True, OutOfTime is raised.
    """
    was_training, total = encoder.training, len(indices)
    bar = Progress(total=total, initial=done, desc=reader.path.name, unit="images")
    encoder.eval()
    try:
        with bar, inputs.precision():
            for images, here in inputs.threads.units(center_views(reader, indices[done:], inputs), "represent"):
                if stop is not None and stop():
                    raise OutOfTime(f"time ran out after {done} of {total} images of {reader.path}")
                take(encoder(images)[: len(here)], here, done)
                done += len(here)
                bar.update(len(here))
    finally:
        encoder.train(was_training)


def represent_both(
    encoder: Encoder, files: tuple[Reader, Reader], inputs: InputSettings, *, bank: int | None = None
) -> tuple[Features, Features]:
    """Compute and check the representations of a training and a validation file; `bank` limits the first."""
    train, val = files
    both = (
        represent(encoder, train, evenly_spaced(len(train), bank), inputs),
        represent(encoder, val, evenly_spaced(len(val), None), inputs),
    )
    for features, reader in zip(both, files, strict=True):
        check_features(features, reader.path)
    return both
