"""Laws of the grid of methods: a division that leaves nothing out, methods as text, and a table of means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality, rows
from fastbyol.beton import Reader
from fastbyol.errors import ConfigError
from tests.conftest import Betons


def test_held_out_images_are_alike_in_number_and_none_is_lost(betons: Betons, tmp_path: Path) -> None:
    learn, held = quality.hold_out(betons.train, tmp_path, per_class=3)
    with Reader(betons.train) as whole, Reader(learn) as first, Reader(held) as second:
        assert second.labels is not None
        assert set(np.unique(second.labels, return_counts=True)[1]) == {3}
        parts = [bytes(part.payload(index)) for part in (first, second) for index in range(len(part))]
        assert sorted(parts) == sorted(bytes(whole.payload(index)) for index in range(len(whole)))


def test_images_without_labels_cannot_be_held_out(betons: Betons, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no labels, and scores need them"):
        quality.hold_out(betons.unlabelled, tmp_path)


def test_a_method_is_a_change_and_flags() -> None:
    assert quality.parse_method("A b: beta=1+queue=0 --precision=bfloat16") == (
        "A b",
        "beta=1+queue=0",
        ("--precision=bfloat16",),
    )
    assert quality.parse_method("BYOL:").recipe("demo") == "demo"


def test_the_table_has_means_and_half_the_range() -> None:
    cell = {"shape": "demo", "implementation": "A", "split": "held out", "budget_cpu_s": 60.0, "epochs": 2.5}
    runs = [{**cell, "knn_top1": score, "cpu_s": used_s} for score, used_s in ((40.0, 58), (44.0, 62), (None, 9))]
    found = quality.summary(runs, recipe="demo", split="held out")
    assert "| A | 42.0 ± 2.0 (2.5 ep., 60 s) |" in quality.table(found)


def test_a_run_that_used_much_more_or_less_than_its_budget_is_no_fair_one() -> None:
    used = {52.0: True, 68.0: True, 43.0: False, 72.0: False}
    assert {cpu_s: quality.is_fair({"budget_cpu_s": 60.0, "cpu_s": cpu_s}) for cpu_s in used} == used


def test_longer_budgets_of_a_method_keep_the_cost_that_its_rows_have() -> None:
    here = rows.place("cpu")["hardware"]
    row = {"shape": "demo", "implementation": "A", "split": "held out", "seed": 0}
    grid = [
        {**row, "budget_cpu_s": 60.0, "epochs": 3.0, "hardware": here},
        {**row, "budget_cpu_s": 300.0, "epochs": 12.0, "hardware": here},
        {**row, "budget_cpu_s": 900.0, "epochs": 1.0, "hardware": "another processor"},
    ]
    asked = quality.Cell("demo", "A", "held out", 1200.0, 7)
    assert quality.known_pace(grid, asked) == 0.04
    assert quality.known_pace(grid, asked._replace(implementation="B")) is None
    assert quality.known_pace(grid, asked._replace(split="test")) is None
