"""The semi-supervised protocol: fine-tuning on a class-balanced part of the labels, such as 1 or 10 %."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.beton import Reader
from fastbyol.evaluate import metrics, splits
from fastbyol.evaluate.features import labels_of
from fastbyol.evaluate.finetune import Classifier, HParams, Trial, predict, run_trials
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.protocol import Files, Job, Protocol, add_lrs, add_seed
from fastbyol.evaluate.splits import Split
from fastbyol.model.parts import Encoder
from fastbyol.recipe import scale_lr
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import Scores
from fastbyol.system.command_line import proper_fraction, whole_number

BATCH = 1024
BASE_LRS = (0.005, 0.01, 0.02, 0.05, 0.1)  # times batch / 256; paper, appendix C.1
EPOCHS = (30, 50)


def combinations(images: int, base_lrs: Sequence[float], epochs: Sequence[int]) -> list[HParams]:
    """List the hyperparameters to try for this number of labelled images: batch 1024 or fewer, no weight decay."""
    batch = min(BATCH, images)
    rates = [scale_lr(base_lr, batch_size=batch) for base_lr in base_lrs]
    return [HParams(lr, 0.0, max(n * images // batch, 1), batch) for lr, n in product(rates, epochs)]


def score(
    encoder: Encoder,
    files: tuple[Reader, Reader],
    split: Split,
    *,
    base_lrs: Sequence[float] = BASE_LRS,
    epochs: Sequence[int] = EPOCHS,
    inputs: InputSettings,
    seed: int = 0,
    label: str = "semi",
) -> dict[str, Any]:
    """Fine-tune on split.learn of the first file, choose by top-1 on split.held, and score on the second file.

    Every parameter is trained by SGD with Nesterov momentum 0.9 and a cosine learning rate, without regularisation. As
    in the paper, the held-out images lie outside the labelled part; they only choose the learning rate and the length.
    """
    train, val = files
    sweep = combinations(len(split.learn), base_lrs, epochs)
    tried: list[Trial] = []
    network: Classifier | None = None
    for trial, tuned in run_trials(encoder, train, split, sweep, metric="top1", inputs=inputs, seed=seed, label=label):
        if network is None or trial.score > max(other.score for other in tried):
            network = tuned
        tried.append(trial)
    assert network is not None, "a sweep has at least one plan"
    choices = [{"base_lr": lr, "epochs": n} for lr, n in product(base_lrs, epochs)]
    held_out = [{**name, "top1": trial.score} for name, trial in zip(choices, tried, strict=True)]
    best = max(range(len(tried)), key=lambda n: tried[n].score)
    scores, labels = predict(network, val, np.arange(len(val)), inputs)
    return {
        **metrics.accuracies(scores, labels, seed=seed),
        **choices[best],
        "labelled": len(split.learn),
        "held_out": held_out,
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fraction", type=proper_fraction, default=0.01, metavar="X", help="share of the training labels to learn from"
    )
    parser.add_argument(
        "--split",
        type=Path,
        metavar="F.json",
        help="a stored split (default: that of this fraction and seed in RUN/splits, made if it is not there)",
    )
    add_lrs(parser, BASE_LRS, text="learning rates per 256 images to choose from")
    parser.add_argument(
        "--epochs", type=whole_number, nargs="+", default=list(EPOCHS), metavar="N", help="lengths to choose from"
    )
    add_seed(parser)
    parser.add_argument("--skip-supervised", action="store_true", help="leave out the network from scratch")


def _prepare(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, Job]:
    labels = labels_of(files[0])
    split, path = _find_split(args, labels)

    def job(encoder: Encoder, label: str) -> Scores:
        return score(
            encoder, files, split, base_lrs=args.lrs, epochs=args.epochs, inputs=inputs, seed=args.seed, label=label
        )

    return {"split": None if path is None else str(path), "fraction": split.learn.size / len(labels)}, job


def _find_split(args: argparse.Namespace, labels: NDArray[np.int64]) -> tuple[Split, Path | None]:
    """Return the split that is given or stored, or a new one; and its file, None where it cannot be stored."""
    name = f"{args.fraction:g}-seed{args.seed}-{splits.fingerprint(labels)[:8]}.json"
    path: Path = args.split or RunFolder(args.run_dir).splits / name
    if args.split is not None or path.exists():
        return splits.load(path, labels), path
    split = splits.balanced_split(labels, args.fraction, seed=args.seed)
    try:
        splits.save(path, split, labels, fraction=args.fraction, seed=args.seed)
    except OSError as error:  # the same arguments draw it again
        print(f"fastbyol-eval: warning: the split could not be saved in {path.parent}: {error}", file=sys.stderr)
        return split, None
    return split, path


PROTOCOL = Protocol(
    _add_arguments, _prepare, baseline="supervised", scores_baseline=lambda args: not args.skip_supervised
)
