"""Linear transfer: logistic regression on frozen representations, with the penalty chosen on held-out images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastbyol.evaluate import logistic, metrics
from fastbyol.evaluate.features import Features, represent_both
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.protocol import Files, Job, Protocol, add_seed
from fastbyol.evaluate.splits import hold_out
from fastbyol.model.parts import Encoder
from fastbyol.storage.scores import Scores
from fastbyol.system.threads import NO_TUNING, ThreadTuner


def score(
    train: Features,
    val: Features,
    *,
    l2s: Sequence[float] = logistic.L2_PATH,
    metric: str = "top1",
    device: str = "cpu",
    threads: ThreadTuner = NO_TUNING,
    seed: int = 0,
    label: str = "transfer",
) -> dict[str, Any]:
    """Choose the penalty on a held-out tenth of `train`, refit on all of it and score on `val`, in percent.

    Penalties are tried from the largest down, each fit starting from the solution before it; the refit starts from the
    chosen solution. Of equal scores the largest penalty wins. Source: paper, appendix D, and docs/numerics.md.
    """
    classes = int(torch.cat([train.labels, val.labels]).max()) + 1
    split = hold_out(len(train.labels), seed=seed)
    held = train.rows(split.held)
    tried: dict[float, float] = {}
    fits = logistic.fit_path(train.rows(split.learn), l2s, classes=classes, device=device, label=label, threads=threads)
    for l2, model in fits:
        found = metrics.METRICS[metric](model.scores(held.values), held.labels)
        if not tried or found > max(tried.values()):
            best, chosen = l2, model
        tried[l2] = found
    problem = logistic.Problem(train, classes=classes, device=device, threads=threads)
    problem.start_from(chosen)
    final = problem.fit(best, stop=logistic.FINAL)
    scores = final.scores(val.values)
    return {
        **metrics.accuracies(scores, val.labels, seed=seed),
        "metric": metric,
        "score": metrics.METRICS[metric](scores, val.labels),
        "l2": best,
        "held_out": tried,
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    metrics.add_metric(parser)
    add_seed(parser)


def _prepare(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, Job]:
    """Use whole centre squares: the protocol resizes the short side to the network's input size."""
    whole = replace(inputs, margin=1.0)

    def job(encoder: Encoder, label: str) -> Scores:
        train, val = represent_both(encoder, files, whole)
        settings = {"metric": args.metric, "device": inputs.device, "threads": inputs.threads}
        return score(train, val, **settings, seed=args.seed, label=label)

    return {}, job


PROTOCOL = Protocol(_add_arguments, _prepare)
