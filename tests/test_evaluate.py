"""Laws of evaluation: features that touch nothing, kNN and linear against scikit-learn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fastbyol.beton import Reader
from fastbyol.config import ConfigError, EncoderConfig
from fastbyol.encoder import build
from fastbyol.evaluate import knn, linear
from fastbyol.evaluate.features import Features, check_classes, extract
from tests.conftest import Betons


def clusters(count: int, *, seed: int, classes: int = 7, spread: float = 1.5) -> Features:
    generator = torch.Generator().manual_seed(99)
    centres = torch.randn(classes, 16, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(count, 16, generator=generator), labels)


@pytest.mark.parametrize("k", [1, 20])
def test_knn_agrees_with_scikit_learn(k: int) -> None:
    bank, queries = clusters(1500, seed=0), clusters(700, seed=1)
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    peer.fit(bank.values.numpy(), bank.labels.numpy())
    expected = peer.predict(queries.values.numpy())
    ours = knn.predict(bank, queries.values, k=k, temperature=0.07)[:, 0].numpy()
    assert (ours == expected).mean() > 0.998  # float32 similarities may order near-ties differently
    assert knn.top1(bank, queries, k=k) == pytest.approx(100 * (ours == queries.labels.numpy()).mean())


def test_knn_of_the_bank_itself_is_perfect_at_k_one() -> None:
    bank = clusters(300, seed=0)
    assert knn.top1(bank, bank, k=1) == 100


@pytest.mark.parametrize("k", [0, 11])
def test_k_outside_the_bank_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to the 10 images"):
        knn.top1(clusters(10, seed=0), clusters(3, seed=1), k=k)


def test_linear_reaches_scikit_learns_optimum() -> None:
    train, val = clusters(3000, seed=0), clusters(2000, seed=1)
    peer = LogisticRegression(C=1e4, max_iter=1000).fit(train.values, train.labels)
    score = linear.score(train, val)
    assert score.top1 == pytest.approx(100 * peer.score(val.values, val.labels), abs=1.0)
    assert score.top5 > score.top1
    assert score.base_lr in linear.BASE_LRS


def test_linear_is_a_function_of_its_seed() -> None:
    train, val = clusters(300, seed=0), clusters(200, seed=1)
    assert linear.score(train, val, epochs=3) == linear.score(train, val, epochs=3)


def test_linear_of_fewer_classes_than_five_has_full_top5() -> None:
    train, val = clusters(100, seed=0, classes=3), clusters(50, seed=1, classes=3)
    assert linear.score(train, val, epochs=2).top5 == 100


def test_features_leave_the_encoder_as_it_was(betons: Betons) -> None:
    encoder = build(EncoderConfig("resnet8", width=0.125, stem="cifar"), seed=0).train()
    before = copy.deepcopy(encoder.state_dict())
    with Reader(betons.train) as reader:
        features = extract(encoder, reader, eval_px=32, margin=1.0, workers=2)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert features.values.shape == (160, encoder.features)


def test_a_limit_spreads_over_the_file(betons: Betons) -> None:
    encoder = build(EncoderConfig("resnet8", width=0.125, stem="cifar"), seed=0)
    with Reader(betons.train) as reader:
        whole = extract(encoder, reader, eval_px=32, margin=1.0, workers=1)
        part = extract(encoder, reader, eval_px=32, margin=1.0, workers=2, limit=40)
    assert torch.equal(part.labels, whole.labels[::4])
    torch.testing.assert_close(part.values, whole.values[::4])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_of_nothing_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        knn.top1(clusters(10, seed=0), clusters(3, seed=1), k=1, temperature=temperature)


def test_labels_that_name_no_class_are_refused(betons: Betons) -> None:
    with Reader(betons.train) as train, Reader(betons.val) as val:
        check_classes(train, val)
        assert val.labels is not None
        val.labels[3] = -1
        with pytest.raises(ConfigError, match="labels from -1 to 9"):
            check_classes(train, val)


def test_features_need_labels(betons: Betons) -> None:
    encoder = build(EncoderConfig("resnet8", width=0.125), seed=0)
    with Reader(betons.unlabelled) as reader, pytest.raises(ConfigError, match="no labels"):
        extract(encoder, reader, eval_px=32, margin=1.0, workers=1)
