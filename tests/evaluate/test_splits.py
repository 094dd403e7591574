"""Laws of splits: balanced, disjoint, a function of their arguments, and refused for another file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastbyol.errors import ConfigError
from fastbyol.evaluate import splits

LABELS = np.random.default_rng(0).integers(0, 10, 3000)


@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_a_balanced_split_takes_as_many_of_each_class(fraction: float) -> None:
    split = splits.balanced_split(LABELS, fraction, seed=0)
    assert set(np.bincount(LABELS[split.learn]).tolist()) == {round(300 * fraction)}
    assert not set(split.learn.tolist()) & set(split.held.tolist())


def test_a_split_is_a_function_of_labels_fraction_and_seed() -> None:
    first, again, other = (splits.balanced_split(LABELS, 0.1, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.learn, other.learn)


def test_every_class_gives_an_image_and_keeps_one() -> None:
    labels = np.array([0] * 50 + [1] * 2 + [2] * 48)
    split = splits.balanced_split(labels, 0.5, seed=0)
    assert np.bincount(labels[split.learn]).tolist() == [17, 1, 17]
    assert len(splits.balanced_split(labels, 0.001, seed=0).learn) == 3


def test_holding_out_divides_all_images() -> None:
    split = splits.hold_out(1000, seed=3)
    assert np.array_equal(np.sort(np.concatenate(split)), np.arange(1000))
    assert len(split.held) == 100


def test_a_stored_split_comes_back(tmp_path: Path) -> None:
    split = splits.balanced_split(LABELS, 0.1, seed=0)
    path = tmp_path / "splits" / "s.json"
    splits.save(path, split, LABELS, fraction=0.1, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(splits.load(path, LABELS), split, strict=True))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("other labels", "labels differ"),
        ("other count", "splits 3000 images"),
        ("no json", "not a saved split"),
        ("twice", "lists an image twice"),
        ("beyond", "lists an image twice, none, or one beyond"),
    ],
)
def test_a_split_of_another_file_is_refused(case: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    splits.save(path, splits.balanced_split(LABELS, 0.1, seed=0), LABELS, fraction=0.1, seed=0)
    content = json.loads(path.read_text())
    labels = {"other labels": np.roll(LABELS, 1), "other count": LABELS[:-1]}.get(case, LABELS)
    if case == "twice":
        content["held"][0] = content["learn"][0]
    if case == "beyond":
        content["held"][0] = 3000
    path.write_text("[" if case == "no json" else json.dumps(content))
    with pytest.raises(ConfigError, match=expected):
        splits.load(path, labels)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_of_nothing_or_all_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        splits.balanced_split(LABELS, fraction, seed=0)
