"""Laws of what follows from vectors: neighbours and copies as in a double loop, groups that come out the same."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from fastbyol.embed import clusters, neighbours
from fastbyol.embed.vectors import LEFT_OUT, Vectors
from fastbyol.errors import ConfigError


def lay(values: NDArray[Any]) -> Vectors:
    """Make Vectors of values [N, F], with a record of an image that was left out after every third."""
    record = np.dtype([("sample", "<i8"), ("values", values.dtype, values.shape[1:])])
    rows = [row for number in range(len(values)) for row in ([number, LEFT_OUT] if number % 3 == 2 else [number])]
    records = np.zeros(len(rows), record)
    records["sample"] = rows
    records["values"] = [np.full(values.shape[1:], np.nan) if row == LEFT_OUT else values[row] for row in rows]
    return Vectors(records)


def drawn(count: int, *, features: int = 7, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, features)).astype(np.float32)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.dot(a.astype(np.float64), b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", 8)
    monkeypatch.setattr(neighbours, "BANK", 20)
    monkeypatch.setattr(clusters, "ROWS", 16)


@pytest.mark.parametrize("count", [1, 2, 5, 61])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_and_pairs_are_those_of_a_double_loop(count: int, k: int) -> None:
    values = drawn(count)
    found, pairs = neighbours.compare(lay(values), k=k, above=0.5)
    alike = {}
    for a in range(count):
        cosines = {b: cosine(values[a], values[b]) for b in range(count) if b != a}
        wanted = sorted(cosines, key=lambda b: -cosines[b])[:k]
        assert found.rows[a].tolist() == wanted
        np.testing.assert_allclose(found.cosines[a], [cosines[b] for b in wanted], atol=1e-6)
        alike |= {(a, b): value for b, value in cosines.items() if b > a and value >= 0.5}
    assert list(map(tuple, pairs.rows.tolist())) == sorted(alike, key=lambda pair: -alike[pair])
    alone = neighbours.compare(lay(values), above=0.5)[1]
    assert np.array_equal(alone.rows, pairs.rows)


@pytest.mark.parametrize("count", [20, 100])
def test_of_equal_cosines_the_lowest_rows_come_first(count: int) -> None:
    found, _ = neighbours.compare(lay(np.ones((count, 7), np.float32)), k=5)
    for row in range(count):
        assert found.rows[row].tolist() == [other for other in range(count) if other != row][:5]


def test_copies_are_found_at_any_length_and_threshold() -> None:
    values = drawn(40)
    values[33], values[7], values[20] = 3 * values[2], 0.1 * values[2], 0
    found, pairs = neighbours.compare(lay(values), k=3, above=1.0)
    assert list(map(tuple, pairs.rows.tolist())) == [(2, 7), (2, 33), (7, 33)]
    assert set(found.rows[2][:2].tolist()) == {7, 33}
    assert found.cosines.max() <= 1
    assert (found.cosines[20] == 0).all()


def test_half_precision_and_order_of_rows_change_little() -> None:
    values = drawn(50)
    whole, half = (neighbours.compare(lay(values.astype(kind)), k=3)[0] for kind in (np.float32, np.float16))
    np.testing.assert_allclose(whole.cosines, half.cosines, atol=2e-3)
    back = neighbours.compare(lay(values[::-1].copy()), k=3)[0]
    assert np.array_equal(49 - back.rows[::-1], whole.rows)


def test_too_many_pairs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "PAIRS_MAX", 100)
    with pytest.raises(ConfigError, match="give a higher --duplicates"):
        neighbours.compare(lay(np.ones((30, 3), np.float32)), above=0.9)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_name_their_images(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 4)
    values = drawn(11)
    names = [f'{number}, "<b>"' for number in range(11)]
    found, pairs = neighbours.compare(lay(values), k=2, above=0.3)
    near, alike = tmp_path / f"n{suffix}", tmp_path / f"d{suffix}"
    neighbours.write_nearest(near, names, found)
    neighbours.write_pairs(alike, names, pairs)
    rows, copies = (_read(path) for path in (near, alike))
    assert rows[0] == ["name", "rank", "neighbour", "cosine"]
    assert [row[:3] for row in rows[1:]] == [
        [names[image], str(rank + 1), names[found.rows[image, rank]]] for image in range(11) for rank in range(2)
    ]
    np.testing.assert_allclose([float(row[3]) for row in rows[1:]], found.cosines.ravel(), atol=1e-6)
    assert copies[0] == ["name", "copy", "cosine"]
    assert [row[:2] for row in copies[1:]] == [[names[a], names[b]] for a, b in pairs.rows]


def _read(path: Path) -> list[list[str]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.reader(file))
    table = pq.read_table(path)
    return [table.column_names, *([str(value) for value in row.values()] for row in table.to_pylist())]


def test_groups_are_the_clouds_that_were_drawn_and_the_largest_comes_first() -> None:
    sizes = (40, 25, 10)
    centres = np.eye(3, 9, dtype=np.float32) * 8
    truth = np.repeat(np.arange(3), sizes)
    shuffled = np.random.default_rng(1).permutation(truth)
    values = (centres[shuffled] + drawn(75, features=9)) * np.linspace(1, 5, 75, dtype=np.float32)[:, None]
    assert np.array_equal(clusters.cluster(lay(values), 3, seed=0), shuffled)


def test_groups_come_out_the_same_for_a_seed_and_use_all_their_numbers() -> None:
    values = lay(drawn(120))
    first = clusters.cluster(values, 9, seed=3)
    assert np.array_equal(first, clusters.cluster(values, 9, seed=3))
    assert not np.array_equal(first, clusters.cluster(values, 9, seed=4))
    counts = np.bincount(first)
    assert len(counts) == 9
    assert all(a >= b for a, b in itertools.pairwise(counts))


def test_groups_of_copies_and_of_single_images_are_found() -> None:
    assert set(clusters.cluster(lay(np.ones((30, 4), np.float32)), 3, seed=0)) <= {0, 1, 2}
    assert sorted(clusters.cluster(lay(drawn(6)), 6, seed=0)) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="there are 6 images; give at most as many"):
        clusters.cluster(lay(drawn(6)), 7, seed=0)
