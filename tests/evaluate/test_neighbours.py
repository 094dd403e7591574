"""Laws of the shown neighbours: queries chosen by label alone, neighbours by cosine, numbers of the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbyol.beton import Reader
from fastbyol.config import EncoderConfig
from fastbyol.evaluate.features import Features, extract
from fastbyol.evaluate.neighbours import first_of_classes, pick, pick_without_labels
from fastbyol.model.resnet import build
from tests.conftest import Betons


@pytest.mark.parametrize(
    ("labels", "rows", "chosen"),
    [
        ([2, 0, 1, 0, 2], 3, [1, 2, 0]),
        ([2, 0, 1, 0, 2], 5, [1, 2, 0, 3, 4]),  # then the second of classes 0 and 2
        ([2, 0, 1, 0, 2], 9, [1, 2, 0, 3, 4]),
        ([5, 4, 3, 2, 1, 0], 3, [5, 3, 1]),  # classes 0, 2 and 4 of six
        ([7], 1, [0]),
    ],
)
def test_queries_are_the_first_of_classes_spread_evenly(labels: list[int], rows: int, chosen: list[int]) -> None:
    assert first_of_classes(np.array(labels, dtype=np.int64), rows=rows).tolist() == chosen


def test_neighbours_are_the_nearest_by_cosine_whatever_the_lengths() -> None:
    angles = torch.tensor([0.1, 2.0, 0.3, 0.2, 3.0])
    bank = Features(torch.stack((angles.cos(), angles.sin()), 1) * torch.tensor([[9.0], [1], [2], [0.1], [5]]), angles)
    queries = Features(torch.tensor([[4.0, 0.0]]), torch.zeros(1, dtype=torch.int64))
    (found,) = pick(bank, queries, rows=1, k=3)
    assert found.query == 0
    assert found.bank == (0, 3, 2)
    assert found.similarities == pytest.approx(torch.tensor([0.1, 0.2, 0.3]).cos().tolist())


def test_more_neighbours_than_the_bank_holds_are_all_it_holds() -> None:
    features = Features(torch.eye(2), torch.arange(2))
    assert [len(found.bank) for found in pick(features, features, rows=9, k=5)] == [2, 2]


def test_without_labels_queries_are_spread_evenly_and_no_image_is_its_own_neighbour() -> None:
    angles = torch.arange(6) / 10
    values = torch.stack((angles.cos(), angles.sin()), 1) * torch.tensor([[9.0], [1], [2], [0.1], [5], [3]])
    samples = np.arange(6) * 10
    found = pick_without_labels(values, samples, rows=2, k=2)
    assert [near.query for near in found] == [0, 30]
    assert found[0].bank == (10, 20)
    assert set(found[1].bank) == {20, 40}
    assert found[0].similarities == pytest.approx(torch.tensor([0.1, 0.2]).cos().tolist())
    assert [len(near.bank) for near in pick_without_labels(values[:2], samples[:2], rows=9, k=5)] == [1, 1]


def test_numbers_are_those_of_the_file_the_bank_was_spread_over(betons: Betons) -> None:
    encoder = build(EncoderConfig("resnet8", width=1 / 16, stem="cifar"), seed=0)
    with Reader(betons.train) as train:
        bank = extract(encoder, train, eval_px=16, margin=1.0, workers=1, limit=37)
        whole = extract(encoder, train, eval_px=16, margin=1.0, workers=1)
        found = pick(bank, bank, rows=8, k=1, bank_images=len(train))
        for near in found:
            place = near.bank[0]  # an image is nearest to itself
            assert torch.equal(whole.values[place], bank.values[near.query])
            assert train.labels is not None
            assert train.labels[place] == bank.labels[near.query]
