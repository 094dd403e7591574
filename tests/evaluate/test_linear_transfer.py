"""Laws of logistic regression and linear transfer: scikit-learn's minimum, at every penalty."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fastbyol.evaluate import linear_transfer, logistic
from fastbyol.evaluate.features import Features

L2S = (1e-4, 1e-2, 1.0, 1e2, 1e4)


def skewed(count: int, *, seed: int, classes: int = 6, features: int = 12) -> Features:
    """Draw features of very different scales, off centre, with classes that overlap."""
    fixed = torch.Generator().manual_seed(7)
    centres = torch.randn(classes, features, generator=fixed)
    mixing = torch.randn(features, features, generator=fixed) * torch.logspace(1, -1, features)
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=drawn)
    noise = 2.0 * torch.randn(count, features, generator=drawn)
    return Features((centres[labels] + noise) @ mixing + 3, labels)


def newton(train: Features, l2: float) -> LogisticRegression:
    """Find the minimum by scikit-learn; its own L-BFGS stops short of it on features of such different scales."""
    return LogisticRegression(C=1 / l2, solver="newton-cg", max_iter=300, tol=1e-6).fit(
        train.values.double(), train.labels
    )


def test_the_path_has_the_papers_45_values() -> None:
    assert len(logistic.L2_PATH) == 45
    assert logistic.L2_PATH[0] == pytest.approx(1e-6)
    assert logistic.L2_PATH[-1] == pytest.approx(1e5)


def test_each_fit_is_scikit_learns_minimum() -> None:
    train, val = skewed(400, seed=0), skewed(400, seed=1)
    for l2, model in logistic.fit_path(train, (1e3, 1.0, 1e-2), classes=6, device="cpu", label="path"):
        peer = newton(train, l2)
        theirs = logistic.Model(torch.from_numpy(peer.coef_.T), torch.from_numpy(peer.intercept_))
        assert logistic.loss(model, train, l2) == pytest.approx(logistic.loss(theirs, train, l2), rel=1e-5)
        agree = model.scores(val.values).argmax(1) == torch.from_numpy(peer.predict(val.values.double()))
        assert agree.double().mean() > 0.99


def test_warm_starts_do_not_move_the_minimum() -> None:
    train = skewed(500, seed=0)
    cold = logistic.Problem(train, classes=6).fit(0.1)
    *_, (_, warm) = logistic.fit_path(train, (1e4, 10.0, 0.1), classes=6, device="cpu", label="path")
    assert logistic.loss(warm, train, 0.1) == pytest.approx(logistic.loss(cold, train, 0.1), rel=1e-4)


def test_pieces_of_rows_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    train = skewed(500, seed=0)
    whole = logistic.Problem(train, classes=6).fit(1.0)
    monkeypatch.setattr(logistic, "ROWS", 77)
    torch.testing.assert_close(logistic.Problem(train, classes=6).fit(1.0).weights, whole.weights, rtol=0, atol=1e-4)


def test_a_great_penalty_leaves_the_class_frequencies() -> None:
    train = skewed(500, seed=0)
    model = logistic.Problem(train, classes=6).fit(1e12)
    shares = torch.bincount(train.labels) / 500
    torch.testing.assert_close(model.scores(train.values).softmax(1).mean(0), shares, rtol=0, atol=1e-3)


def test_a_refit_reaches_the_minimum_of_separable_images() -> None:
    """Ten steps do not: at a small penalty the minimum is far from where they begin."""
    generator = torch.Generator().manual_seed(0)
    means, scales = torch.randn(5, 64, generator=generator), torch.logspace(0, -2, 64)
    labels = torch.randint(5, (600,), generator=generator)
    images = Features((means[labels] + torch.randn(600, 64, generator=generator)) * scales, labels)
    l2 = 1e-4
    peer = newton(images, l2)
    weights, biases = (torch.tensor(x).float() for x in (peer.coef_.T, peer.intercept_))
    least = logistic.loss(logistic.Model(weights, biases), images, l2)
    problem = logistic.Problem(images, classes=5)
    begun = logistic.loss(problem.fit(l2, stop=logistic.StopCriterion(10, 0)), images, l2)
    assert begun > 1.2 * least
    assert logistic.loss(problem.fit(l2, stop=logistic.FINAL), images, l2) == pytest.approx(least, rel=1e-2)


@pytest.mark.parametrize("metric", ["top1", "map11"])
def test_transfer_scores_as_scikit_learn_at_the_chosen_penalty(metric: str) -> None:
    train, val = skewed(600, seed=0), skewed(1000, seed=1)
    score = linear_transfer.score(train, val, l2s=L2S, metric=metric)
    assert set(score["held_out"]) == set(L2S)
    best = max(score["held_out"].values())
    assert score["l2"] == max(l2 for l2, held in score["held_out"].items() if held == best)
    peer = newton(train, score["l2"])
    assert score["top1"] == pytest.approx(100 * peer.score(val.values.double(), val.labels), abs=0.2)
    assert (score["score"] == score["top1"]) == (metric == "top1")
