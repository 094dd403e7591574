"""Laws of fine-tuning: a copy is tuned, by the plan, on the images named; labels beside them play no part."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastbyol.beton import Reader
from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.evaluate import finetune, semi_supervised
from fastbyol.evaluate.finetune import Grid, HParams
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.splits import balanced_split, hold_out
from fastbyol.model.resnet import ResNet, build
from tests.conftest import Betons

INPUTS = InputSettings(24, 1.0)
HPARAMS = HParams(lr=0.05, weight_decay=0.0, steps=3, batch=16)


@pytest.fixture
def files(betons: Betons) -> Iterator[tuple[Reader, Reader]]:
    with Reader(betons.train) as train, Reader(betons.val) as val:
        yield train, val


@pytest.fixture
def encoder() -> ResNet:
    return build(EncoderConfig("resnet8", width=0.125, stem="cifar_stride2"), seed=0).eval()


def tuned(encoder: ResNet, train: Reader, indices: list[int], hparams: HParams = HPARAMS) -> finetune.Classifier:
    return finetune.tune(encoder, train, np.array(indices), hparams=hparams, inputs=INPUTS, seed=0, label="tune")


def test_tuning_leaves_the_encoder_it_starts_from(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    before = copy.deepcopy(encoder.state_dict())
    network = tuned(encoder, files[0], list(range(64)))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    moved = [not torch.equal(before[name], value) for name, value in network.encoder.state_dict().items()]
    assert all(moved)


def test_a_batch_of_any_size_is_one_population(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    batch_norm, seen = encoder.with_views(2).bn1, []
    encoder.bn1.register_forward_pre_hook(lambda layer, given: seen.append((layer.views, len(given[0]))))
    tuned(encoder.with_views(2), files[0], list(range(64)), HPARAMS._replace(batch=15))
    assert batch_norm.views == 2
    assert seen == [(1, 15)] * HPARAMS.steps


def test_a_rate_of_zero_moves_running_statistics_alone(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    network = tuned(encoder, files[0], list(range(64)), HPARAMS._replace(lr=0.0))
    for name, value in encoder.named_parameters():
        assert torch.equal(network.encoder.get_parameter(name), value)
    assert not torch.equal(network.encoder.bn1.running_mean, encoder.bn1.running_mean)


def test_tuning_repeats_and_reads_named_images_only(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    train, named = files[0], list(range(0, 64, 2))
    first = tuned(encoder, train, named).state_dict()
    assert train.labels is not None
    train.labels[1::2] = 0
    again = tuned(encoder, train, named).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("images", "expected"), [(20, 0.1), (1600, 0.1), (16_000, 0.01)])
def test_batch_norm_keeps_what_the_protocol_says(
    images: int, expected: float, encoder: ResNet, files: tuple[Reader, Reader]
) -> None:
    network = tuned(encoder, files[0], [n % 160 for n in range(images)], HPARAMS._replace(steps=1))
    steps_per_epoch = images / HPARAMS.batch
    assert network.encoder.bn1.momentum == pytest.approx(expected)
    assert 1 - network.encoder.bn1.momentum == pytest.approx(max(1 - 10 / steps_per_epoch, 0.9))


def test_the_grid_is_the_papers() -> None:
    combinations = Grid().combinations(batch=256)
    assert len(combinations) == 7 * 8
    assert {hparams.steps for hparams in combinations} == {20_000}
    products = {f"{hparams.lr * hparams.weight_decay:.2g}" for hparams in combinations}
    assert products == {"0", "1e-06", "3.2e-06", "1e-05", "3.2e-05", "0.0001", "0.00032", "0.001"}
    assert min(hparams.lr for hparams in combinations) == pytest.approx(1e-4)
    assert max(hparams.lr for hparams in combinations) == pytest.approx(1e-1)


def test_the_semi_supervised_sweep_is_the_papers() -> None:
    combinations = semi_supervised.combinations(12_811, semi_supervised.BASE_LRS, semi_supervised.EPOCHS)
    assert len(combinations) == 10
    assert {hparams.batch for hparams in combinations} == {1024}
    assert {hparams.steps for hparams in combinations} == {30 * 12_811 // 1024, 50 * 12_811 // 1024}
    assert max(hparams.lr for hparams in combinations) == pytest.approx(0.4)
    assert all(hparams.weight_decay == 0 for hparams in combinations)


def test_fine_tuning_chooses_the_plan_that_learns(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    grid = Grid(lrs=(1e-7, 0.1), weight_decays=(0.0,), steps=40)
    score = finetune.score(encoder, files, grid=grid, metric="mean-per-class", inputs=INPUTS)
    assert score["lr"] == 0.1
    assert len(score["held_out"]) == 2
    assert score["metric"] == "mean-per-class"
    worst, best = (row["score"] for row in score["held_out"])
    assert best > worst


def test_one_plan_is_not_tried_before_it_is_taken(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    score = finetune.score(encoder, files, grid=Grid((0.05,), (1e-4,), 2), inputs=INPUTS)
    assert score["held_out"] == []
    assert score["weight_decay"] == pytest.approx(1e-4 / 0.05)


def test_semi_reports_its_sweep(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    labels = files[0].labels
    assert labels is not None
    split = balanced_split(labels, 0.25, seed=0)
    score = semi_supervised.score(encoder, files, split, base_lrs=(0.5, 1e-9), epochs=(1, 4), inputs=INPUTS)
    assert score["labelled"] == len(split.learn) == 40
    assert [(row["base_lr"], row["epochs"]) for row in score["held_out"]] == [(0.5, 1), (0.5, 4), (1e-9, 1), (1e-9, 4)]
    chosen = next(row for row in score["held_out"] if row["base_lr"] == score["base_lr"])
    assert chosen["top1"] <= max(row["top1"] for row in score["held_out"])
    assert math.isfinite(score["top1"])


def test_a_single_image_cannot_be_tuned_on(encoder: ResNet, files: tuple[Reader, Reader]) -> None:
    with pytest.raises(ConfigError, match="batch norm needs at least 2"):
        tuned(encoder, files[0], [0], HPARAMS._replace(batch=1))


def test_held_out_images_are_a_tenth() -> None:
    assert len(hold_out(160, seed=0).held) == 16
