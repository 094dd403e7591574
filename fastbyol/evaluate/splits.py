"""Know how a labelled set is divided: held-out images, and class-balanced parts that are stored for others to use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol import atomic
from fastbyol.config import ConfigError, require
from fastbyol.order import permutation

HELD_OUT = 0.1  # of train, to choose settings by
HELD_OUT_MAX = 10_009  # images; the size of the paper's local validation set of ImageNet
NO_EPOCH = 2**31  # an order that no training epoch has, of which held-out images would come first


class Split(NamedTuple):
    """Name the images to learn from and the images to choose settings by: int64, rising, disjoint."""

    learn: NDArray[np.int64]
    held: NDArray[np.int64]


def hold_out(count: int, *, seed: int) -> Split:
    """Hold out a tenth of `count` images, at least 1 and at most 10 009, as a function of (count, seed)."""
    shuffled = permutation(count, seed=seed, epoch=NO_EPOCH)
    held = min(max(int(count * HELD_OUT), 1), HELD_OUT_MAX)
    return Split(np.sort(shuffled[held:]), np.sort(shuffled[:held]))


def balanced(labels: NDArray[np.int64], fraction: float, *, seed: int) -> Split:
    """Choose a fraction of the images, as many of each class, as a function of the arguments.

    A class gives round(fraction * N / classes) images, at least 1, or all but one of those it has. Held-out images come
    from the rest, a tenth of all, so that both halves of a choice see none of the other. fraction lies in (0, 1).
    """
    require(0 < fraction < 1, f"fraction is {fraction}; give a share of the training images between 0 and 1")
    classes = np.unique(labels)
    quota = max(round(fraction * len(labels) / len(classes)), 1)
    learn = []
    for c in classes:
        members = np.flatnonzero(labels == c)
        shuffled = members[permutation(len(members), seed=seed, epoch=int(c))]
        learn.append(shuffled[: min(quota, max(len(members) - 1, 1))])
    learned = np.sort(np.concatenate(learn))
    rest = np.setdiff1d(np.arange(len(labels)), learned)
    require(len(rest) > 0, f"{len(labels)} images leave none to choose settings by; give a larger training file")
    held = rest[permutation(len(rest), seed=seed, epoch=0)[: hold_out(len(labels), seed=seed).held.size]]
    return Split(learned, np.sort(held))


def fingerprint(labels: NDArray[np.int64]) -> str:
    """Return the SHA-256 of the labels, by which a stored split knows its file."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def store(path: Path, split: Split, labels: NDArray[np.int64], *, fraction: float, seed: int) -> None:
    """Write a split as JSON: where it comes from, and both lists of positions in the beton."""
    content = {
        "fraction": fraction,
        "seed": seed,
        "images": len(labels),
        "labels_sha256": fingerprint(labels),
        "learn": split.learn.tolist(),
        "held": split.held.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(content) + "\n")


def read(path: Path, labels: NDArray[np.int64]) -> Split:
    """Read what `store` wrote; raise ConfigError when it is no split, or one of a file with other labels."""
    try:
        content = json.loads(path.read_text())
        split = Split(*(np.array(content[name], dtype=np.int64) for name in ("learn", "held")))
        images, sha = content["images"], content["labels_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a stored split ({error}); give a file that fastbyol-eval semi wrote"
        ) from error
    require(
        images == len(labels) and sha == fingerprint(labels),
        f"{path} divides {images} images with other labels than the {len(labels)} of --train; "
        "give the file it was made for, or another --split",
    )
    both = np.concatenate(split)
    inside = split.learn.size and split.held.size and both.min() >= 0 and both.max() < len(labels)
    require(
        bool(inside) and np.unique(both).size == both.size,
        f"{path} names images twice, none, or beyond the {len(labels)} of the file; write it again",
    )
    return split
