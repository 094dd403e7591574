"""Laws of evaluation: features that touch nothing, kNN and linear against scikit-learn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fastbyol.beton import JPEG, BetonError, Reader, StoredImage
from fastbyol.config import EncoderConfig
from fastbyol.data_prep import demo
from fastbyol.data_prep.writer import Writer
from fastbyol.errors import ConfigError
from fastbyol.evaluate import knn, linear
from fastbyol.evaluate.features import Features, OutOfTime, check_classes, check_features, extract
from fastbyol.evaluate.finetune import Classifier, predict
from fastbyol.evaluate.images import InputSettings, random_crops, shuffled_batches
from fastbyol.model.resnet import build
from fastbyol.order import Rows
from fastbyol.system.threads import NO_TUNING
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


def test_plain_knn_agrees_with_scikit_learn() -> None:
    bank, queries = clusters(1500, seed=0), clusters(700, seed=1)
    peer = KNeighborsClassifier(20, metric="cosine").fit(bank.values.numpy(), bank.labels.numpy())
    cell = knn.sweep(bank, queries, (20,), (0.07,))[1]
    assert cell.temperature is None
    assert cell.top1 == pytest.approx(100 * peer.score(queries.values.numpy(), queries.labels.numpy()), abs=0.3)


def test_pieces_of_bank_and_queries_do_not_change_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = clusters(500, seed=0).values, clusters(90, seed=1).values
    similarities = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(bank).T
    expected = similarities.topk(40)
    monkeypatch.setattr(knn, "BANK_CHUNK", 33)  # fewer than the neighbours asked for
    monkeypatch.setattr(knn, "SIMILARITIES", 33 * 7)
    found = knn.nearest(bank, queries, 40)
    torch.testing.assert_close(found[0], expected.values)
    assert (found[1] == expected.indices).double().mean() > 0.999  # near-ties


def test_a_sweep_gives_each_cell_its_own_score() -> None:
    bank, queries = clusters(600, seed=0), clusters(300, seed=1)
    cells = knn.sweep(bank, queries, (1, 5, 50), (0.07, 0.5))
    assert [(cell.k, cell.temperature) for cell in cells[:4]] == [(1, 0.07), (1, 0.5), (1, None), (5, 0.07)]
    for cell in cells:
        if cell.temperature is not None:
            assert cell.top1 == knn.top1(bank, queries, k=cell.k, temperature=cell.temperature)
    assert len({cell.top1 for cell in cells}) > 1


def test_extraction_leaves_a_network_in_training_as_it_was(betons: Betons) -> None:
    encoder = build(EncoderConfig("resnet8", width=0.125, stem="cifar_stride2"), seed=0).train()
    before = copy.deepcopy(encoder.state_dict())
    with Reader(betons.train) as train:
        extract(encoder, train, eval_px=32, margin=1.0, workers=1, limit=100)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_a_stand_in_brings_its_own_label(tmp_path: Path) -> None:
    images, labels = demo.draw(12, seed=0, split="train")
    with Writer(tmp_path / "damaged.beton", capacity=12, class_names=demo.CLASS_NAMES) as writer:
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            data = simplejpeg.encode_jpeg(image, quality=90) if number != 3 else b"no image"
            writer.append(StoredImage(JPEG, 32, 32, data), label=label)
    encoder = build(EncoderConfig("resnet8", width=0.125, stem="cifar_stride2"), seed=0)
    with Reader(tmp_path / "damaged.beton") as reader:
        seen = extract(encoder, reader, eval_px=32, margin=1.0, workers=1, on_error="skip")
        with pytest.raises(BetonError, match="3"):
            extract(encoder, reader, eval_px=32, margin=1.0, workers=1)
        inputs = InputSettings(32, 1.0, workers=1, on_error="skip")
        _, fine_tuned_on = predict(Classifier(encoder, 8).eval(), reader, np.arange(12), inputs)
    assert seen.labels[3] == labels[4] != labels[3]
    assert torch.equal(fine_tuned_on, seen.labels)
    assert torch.equal(seen.values[3], seen.values[4])


def test_a_stop_ends_extraction_and_gives_the_network_back(betons: Betons) -> None:
    encoder = build(EncoderConfig("resnet8", width=0.125, stem="cifar_stride2"), seed=0).train()
    with Reader(betons.train) as reader, pytest.raises(OutOfTime, match="after 0 of 160 images"):
        extract(encoder, reader, eval_px=32, margin=1.0, workers=1, stop=lambda: True)
    assert encoder.training


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


def heads_of(base_lrs: tuple[float, ...], train: Features, held: torch.Tensor) -> linear.Heads:
    def train_batches() -> Iterator[linear.TrainBatch]:
        for rows in shuffled_batches(np.arange(len(train.labels)), batch=50, steps=24, seed=3):
            chosen = torch.from_numpy(rows.indices)
            yield train.values[chosen], train.labels[chosen], held[chosen]

    return linear.fit(train_batches(), 24, base_lrs, batch=50, classes=7, label="heads", threads=NO_TUNING)


def test_heads_trained_together_are_those_trained_alone() -> None:
    train = clusters(200, seed=0)
    held = torch.arange(200) % 10 == 0
    together = heads_of((0.4, 0.1), train, held).scores(train.values)
    for n, lr in enumerate((0.4, 0.1)):
        alone = heads_of((lr,), train, held).scores(train.values)
        torch.testing.assert_close(together[:, n], alone[:, 0])


def test_choosing_heads_never_see_held_out_labels() -> None:
    train = clusters(200, seed=0)
    held = torch.arange(200) % 10 == 0
    first = heads_of((0.4, 0.1), train, held).scores(train.values)
    train.labels[held] = (train.labels[held] + 1) % 7
    second = heads_of((0.4, 0.1), train, held).scores(train.values)
    assert torch.equal(first[:, 2:], second[:, 2:])
    assert not torch.equal(first[:, :2], second[:, :2])


def test_a_head_is_torchs_nesterov_descent() -> None:
    train = clusters(200, seed=0)
    ours = heads_of((0.3,), train, torch.zeros(200, dtype=torch.bool)).scores(train.values)[:, 0]
    peer = torch.nn.Linear(16, 7)
    torch.nn.init.zeros_(peer.weight)
    torch.nn.init.zeros_(peer.bias)
    optimizer = torch.optim.SGD(peer.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    for step, rows in enumerate(shuffled_batches(np.arange(200), batch=50, steps=24, seed=3)):
        optimizer.param_groups[0]["lr"] = 0.3 * 50 / 256 * (1 + np.cos(np.pi * step / 24)) / 2
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(peer(train.values[rows.indices]), train.labels[rows.indices]).backward()
        optimizer.step()
    torch.testing.assert_close(ours, peer(train.values).detach())


def test_augmented_linear_touches_no_encoder_and_repeats(betons: Betons) -> None:
    encoder = build(EncoderConfig("resnet8", width=0.25, stem="cifar_stride2"), seed=0)
    before = copy.deepcopy(encoder.state_dict())
    with Reader(betons.train) as train, Reader(betons.val) as val:
        first, again = (
            linear.score_augmented(encoder, (train, val), InputSettings(32, 1.0), epochs=5, seed=1) for _ in range(2)
        )
    assert first == again
    assert set(first.held_out) == set(linear.BASE_LRS)
    assert first.top1_interval[0] <= first.top1 <= first.top1_interval[1]
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_crops_differ_by_epoch_and_not_by_batch(betons: Betons) -> None:
    with Reader(betons.train) as reader:

        def crops(indices: list[int], epoch: int) -> torch.Tensor:
            rows = Rows(np.array(indices), np.full(len(indices), epoch))
            return next(random_crops(reader, [rows], InputSettings(24, 1.0), seed=0))[0]

        torch.testing.assert_close(crops([5, 9, 2], 1)[1:], crops([9, 2], 1))
        assert not torch.equal(crops([9, 2], 1), crops([9, 2], 2))


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


def test_representations_with_nan_are_refused() -> None:
    features = clusters(10, seed=0)
    features.values[3, 2] = float("nan")
    with pytest.raises(ConfigError, match=r"of x\.beton hold NaN or inf in 1 of 10 images"):
        check_features(features, "x.beton")


def test_one_label_must_stand_for_each_image() -> None:
    features = clusters(10, seed=0)
    with pytest.raises(ConfigError, match="10 representations and 9 labels"):
        check_features(Features(features.values, features.labels[1:]), "x.beton")


def test_validation_classes_that_train_lacks_are_refused(betons: Betons) -> None:
    with Reader(betons.train) as train, Reader(betons.val) as val:
        assert train.labels is not None
        train.labels[train.labels == 4] = 5
        with pytest.raises(ConfigError, match=r"has 1 classes that .* has no image of \(labels 4\)"):
            check_classes(train, val)
