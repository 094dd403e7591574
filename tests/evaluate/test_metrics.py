"""Laws of the metrics: the definitions, written out, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor

from fastbyol.evaluate import metrics


def guesses(count: int = 400, classes: int = 7, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator) ** 2 // classes  # unequal classes
    scores = torch.randn(count, classes, generator=generator)
    scores[torch.arange(count), labels] += 1
    return scores, labels


def naive_map11(scores: Tensor, labels: Tensor) -> float:
    probabilities = scores.softmax(1).numpy()
    total = []
    for c in np.unique(labels.numpy()):
        ranked = (labels.numpy() == c)[np.argsort(-probabilities[:, c], kind="stable")]
        points = []
        for tenth in range(11):
            best = 0.0
            for n in range(1, len(ranked) + 1):
                if 10 * ranked[:n].sum() >= tenth * ranked.sum():
                    best = max(best, ranked[:n].mean())
            points.append(best)
        total.append(np.mean(points))
    return 100 * float(np.mean(total))


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_is_scikit_learns(k: int) -> None:
    scores, labels = guesses()
    expected = top_k_accuracy_score(labels, scores, k=k, labels=range(7))
    assert metrics.percent(metrics.hits(scores, labels, k=k)) == pytest.approx(100 * expected)


def test_k_above_the_number_of_classes_always_hits() -> None:
    scores, labels = guesses(classes=3)
    assert metrics.hits(scores, labels, k=5).all()


def test_mean_per_class_is_scikit_learns_balanced_accuracy() -> None:
    scores, labels = guesses(4000)
    scores[:, labels.bincount(minlength=7) == 0] = -9  # scikit-learn warns of a guess that never occurs
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert metrics.mean_per_class(scores, labels) == pytest.approx(100 * expected)
    assert metrics.mean_per_class(scores, labels) != pytest.approx(metrics.top1(scores, labels), abs=0.1)


def test_map11_is_its_definition() -> None:
    scores, labels = guesses(60, 5)
    assert metrics.map11(scores, labels) == pytest.approx(naive_map11(scores, labels))


def test_map11_of_a_perfect_ranking_is_full() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    assert metrics.map11(9.0 * torch.eye(3)[labels], labels) == pytest.approx(100)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_diverged_classifier_never_hits(broken: float) -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    assert metrics.top1(torch.full((8, 3), broken), labels) == 0


def test_the_interval_is_that_of_resampled_images() -> None:
    hit = torch.arange(500) % 10 < 7
    rng = np.random.default_rng(1)
    means = 100 * rng.choice(hit.numpy(), (4000, 500)).mean(1)
    assert metrics.interval(hit) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.5)


def test_the_interval_of_certainty_has_no_width() -> None:
    assert metrics.interval(torch.ones(20, dtype=torch.bool)) == (100, 100)
