"""Know how to turn a labelled beton into frozen representations, each image seen once, whole, in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastbyol.beton import Reader
from fastbyol.config import ConfigError
from fastbyol.encoder import ResNet
from fastbyol.loaders.native import load
from fastbyol.order import Rows
from fastbyol.views import center_view

BATCH = 256
CLASSES_MAX = 65_536  # more would be a mistake, and a large one in memory


class OutOfTime(Exception):
    """Tell that an evaluation was stopped before its end."""


class Features(NamedTuple):
    """Pair representations, float32 [N, F], with labels, int64 [N]."""

    values: Tensor
    labels: Tensor


def check_classes(train: Reader, val: Reader) -> None:
    """Raise ConfigError unless both files are labelled, with the same classes."""
    for reader in (train, val):
        if reader.labels is None:
            raise ConfigError(
                f"{reader.path} has no labels, and scoring needs those of both files; write it from class folders"
            )
        low, high = int(reader.labels.min()), int(reader.labels.max())
        if low < 0 or high >= CLASSES_MAX:
            raise ConfigError(f"{reader.path} has labels from {low} to {high}; scoring needs 0 to {CLASSES_MAX - 1}")
    if len(train) < 2:
        raise ConfigError(f"{train.path} holds one image; scoring needs at least 2 to learn from")
    names = {tuple(reader.class_names) for reader in (train, val) if reader.class_names is not None}
    if len(names) > 1:
        raise ConfigError(f"{train.path} and {val.path} name different classes; write both from the same class folders")


@torch.inference_mode()
def extract(
    encoder: ResNet,
    reader: Reader,
    *,
    eval_px: int,
    margin: float,
    workers: int,
    limit: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Features:
    """Represent labelled images by the encoder, on the encoder's device; all of them, or `limit` spread over the file.

    Views are centre squares of share `margin` of the short side, resampled to eval_px. The encoder is left in the
    mode it came in; its batch-norm statistics are not touched. Raises ConfigError when the file has no labels, and
    OutOfTime when `stop`, asked before every batch, says so.
    """
    labels = reader.labels
    if labels is None:
        raise ConfigError(f"{reader.path} has no labels; evaluation needs a file written from class folders")
    device = encoder.conv1.weight.device
    was_training = encoder.training
    encoder.eval()
    count = len(reader) if limit is None else min(limit, len(reader))
    chosen = np.arange(count, dtype=np.int64) * len(reader) // count
    rows = [Rows(part, np.zeros_like(part)) for part in np.array_split(chosen, math.ceil(count / BATCH))]
    parts = []
    with (
        closing(load(reader, rows, workers=workers)) as batches,
        tqdm(total=count, desc=reader.path.name, unit="images", delay=2, leave=False, disable=None) as bar,
    ):
        for batch in batches:
            if stop is not None and stop():
                encoder.train(was_training)
                raise OutOfTime
            pixels, offsets, sizes = (t.to(device) for t in (batch.pixels, batch.offsets, batch.sizes))
            images = center_view(pixels, offsets, sizes, crop_px=eval_px, margin=margin)
            parts.append(encoder(images).float().cpu())
            bar.update(len(batch.indices))
    encoder.train(was_training)
    return Features(torch.cat(parts), torch.from_numpy(labels[chosen]))
