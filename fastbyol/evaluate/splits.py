"""Splits of a labelled file: held-out images, and class-balanced parts that are saved for later use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import ConfigError, require
from fastbyol.order import permutation
from fastbyol.storage import files

HELD_OUT = 0.1  # of the training images, to choose settings
HELD_OUT_MAX = 10_009  # images: the size of the paper's local validation set of ImageNet
NO_EPOCH = 2**31  # not a training epoch, so that held-out images are not the first of one


class Split(NamedTuple):
    """Positions of the images to learn from and of those to choose settings on: int64, ascending, disjoint."""

    learn: NDArray[np.int64]
    held: NDArray[np.int64]


def hold_out(count: int, *, seed: int) -> Split:
    """Hold out a tenth of `count` images, at least 1 and at most 10 009; a function of (count, seed)."""
    shuffled = permutation(count, seed=seed, epoch=NO_EPOCH)
    held = min(max(int(count * HELD_OUT), 1), HELD_OUT_MAX)
    return Split(np.sort(shuffled[held:]), np.sort(shuffled[:held]))


def balanced_split(labels: NDArray[np.int64], fraction: float, *, seed: int) -> Split:
    """Choose a fraction in (0, 1) of the images, equally many of each class; a function of the arguments.

    Each class gives round(fraction * N / classes) images, at least 1, or all but one if it has fewer. A tenth of all
    images is held out from the rest, so that the two parts are disjoint.
    """
    require(0 < fraction < 1, f"fraction is {fraction}; give a number between 0 and 1")
    classes = np.unique(labels)
    quota = max(round(fraction * len(labels) / len(classes)), 1)
    learn = []
    for c in classes:
        members = np.flatnonzero(labels == c)
        shuffled = members[permutation(len(members), seed=seed, epoch=int(c))]
        learn.append(shuffled[: min(quota, max(len(members) - 1, 1))])
    learned = np.sort(np.concatenate(learn))
    rest = np.setdiff1d(np.arange(len(labels)), learned)
    require(len(rest) > 0, f"{len(labels)} images leave none to choose settings on; give a larger training file")
    held = rest[permutation(len(rest), seed=seed, epoch=0)[: hold_out(len(labels), seed=seed).held.size]]
    return Split(learned, np.sort(held))


def fingerprint(labels: NDArray[np.int64]) -> str:
    """Return the SHA-256 of the labels, which ties a saved split to its file."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def save(path: Path, split: Split, labels: NDArray[np.int64], *, fraction: float, seed: int) -> None:
    """Write a split as JSON: its origin, and both lists of positions in the .beton."""
    content = {
        "fraction": fraction,
        "seed": seed,
        "images": len(labels),
        "labels_sha256": fingerprint(labels),
        "learn": split.learn.tolist(),
        "held": split.held.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(content) + "\n")


def load(path: Path, labels: NDArray[np.int64]) -> Split:
    """Read a split written by `save`; raise ConfigError if it is not a split or belongs to a file with other labels."""
    try:
        content = json.loads(path.read_text())
        split = Split(*(np.array(content[name], dtype=np.int64) for name in ("learn", "held")))
        images, sha = content["images"], content["labels_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a saved split ({error}); give a file written by fastbyol-eval semi"
        ) from error
    require(
        images == len(labels) and sha == fingerprint(labels),
        f"{path} splits {images} images whose labels differ from those of the {len(labels)} in --train; "
        "give the file it was made for, or another --split",
    )
    both = np.concatenate(split)
    inside = split.learn.size and split.held.size and both.min() >= 0 and both.max() < len(labels)
    require(
        bool(inside) and np.unique(both).size == both.size,
        f"{path} lists an image twice, none, or one beyond the {len(labels)} of the file; write it again",
    )
    return split
