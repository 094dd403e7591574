"""Laws of --method auto: what it may choose, when, and the measured scores that say so."""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import is_fair
from fastbyol.errors import ConfigError
from fastbyol.recipes import named
from fastbyol.recipes.methods import CHOICES, Choice, choose, variants

QUALITY = Path(__file__).parents[2] / "benchmarks" / "results" / "quality"
ROWS = (QUALITY / "rows.jsonl", QUALITY / "gpu.jsonl")
GRID = [json.loads(line) for line in ROWS[0].read_text().splitlines()]
IMAGES = {  # of the grid's files, without those held out
    "cifar10_tiny": 47500,
    "cifar10_tiny+channels=1": 57500,
    "cifar10_tiny+crop_px=48+eval_px=64": 7578,
    "demo": 4000,
}
CHANGE = operator.itemgetter("change")
SHORT_S = 300.0  # CPU-seconds in which BYOL has hardly begun
LEAD = 4.0  # points; Fashion-MNIST's, the least, is 4.8
ALL = [(name, choice) for name, choices in CHOICES.items() for choice in choices]


def mean_of(runs: Iterable[dict[str, Any]]) -> float:
    return statistics.fmean(row["knn_top1"] for row in runs)


@pytest.mark.parametrize("choice", [choice for _, choice in ALL])
def test_a_choice_has_won_at_every_length_up_to_its_end(choice: Choice) -> None:
    lengths = [each.epochs for each in choice.evidence]
    assert lengths == sorted(lengths)
    assert lengths[-1] <= choice.until
    assert all(each.chosen > each.own for each in choice.evidence)


def test_the_rows_of_the_grid_used_the_compute_that_they_name() -> None:
    assert [row for row in GRID if not is_fair(row)] == []


@pytest.mark.parametrize("recipe", sorted({row["shape"] for row in GRID}))
def test_at_every_budget_auto_is_within_a_point_of_the_best_and_far_over_byol_in_short_runs(recipe: str) -> None:
    cells = [row for row in GRID if (row["shape"], row["split"]) == (recipe, "held out")]
    budgets = {row["budget_cpu_s"]: row["epochs"] for row in cells if not row["change"]}  # epochs of the recipe's own
    for budget, epochs in budgets.items():
        cell = [row for row in cells if row["budget_cpu_s"] == budget and row["knn_top1"] is not None]
        scores = {change: mean_of(row for row in cell if row["change"] == change) for change in map(CHANGE, cell)}
        choice = choose(named(recipe), seen=epochs * IMAGES[recipe])
        chosen = scores["" if choice is None else choice.change]
        assert chosen >= max(scores.values()) - 1, (budget, scores)
        assert budget > SHORT_S or chosen >= scores[""] + LEAD, (budget, scores)


@pytest.mark.parametrize(("name", "choice"), ALL)
def test_evidence_is_the_mean_of_the_rows_of_the_grid(name: str, choice: Choice) -> None:
    rows = [json.loads(line) for file in ROWS for line in file.read_text().splitlines()]

    def scores(change: str, budget: float | None) -> list[float]:
        found = [row for row in rows if (row["shape"], row["change"], row["split"]) == (name, change, "held out")]
        return [row["knn_top1"] for row in found if row.get("budget_cpu_s") == budget]

    own = {row.get("budget_cpu_s"): row["epochs"] for row in rows if (row["shape"], row["change"]) == (name, "")}
    for each in choice.evidence:
        (budget,) = [budget for budget, epochs in own.items() if epochs == pytest.approx(each.epochs, rel=0.01)]
        assert statistics.fmean(scores("", budget)) == pytest.approx(each.own, abs=0.06)
        assert statistics.fmean(scores(choice.change, budget)) == pytest.approx(each.chosen, abs=0.06)


@pytest.mark.parametrize("name", CHOICES)
def test_beyond_what_was_measured_the_recipe_keeps_its_method(name: str) -> None:
    recipe, first, last = named(name), CHOICES[name][0], CHOICES[name][-1]
    assert choose(recipe, seen=first.until * first.images / 2) == first
    assert choose(recipe, seen=last.until * last.images * 2) is None
    assert choose(named("imagenet_rn50"), seen=1000) is None


def test_few_images_many_times_are_as_long_a_run_as_many_once() -> None:
    first, second, *_ = CHOICES["cifar10_tiny"]
    assert choose(named("cifar10_tiny"), seen=10 * 47500) == first
    assert choose(named("cifar10_tiny"), seen=62 * 7600) == first
    assert choose(named("cifar10_tiny"), seen=63 * 7600) == second
    assert first.nearest(7 * 7600) == first.evidence[0]
    assert first.nearest(40 * 7600) == first.evidence[1]


def test_a_setting_of_the_user_is_not_overwritten() -> None:
    with pytest.raises(ConfigError, match="sets base_lr, and so do you; leave that out, or --method auto"):
        choose(named("cifar10_tiny+base_lr=0.5"), seen=1000)
    # the second as the recipe has it, and the third is nothing to Muon
    for said in ("views=crop_blur", "batch_size=64", "weight_decay=0.01"):
        with pytest.raises(ConfigError, match=f"sets {said.partition('=')[0]}, and so do you"):
            choose(named(f"cifar10_tiny+{said}"), seen=1000)
    assert choose(named("demo+batch_size=32"), seen=1000) is not None


def test_all_variants_are_whole_recipes_and_the_own_comes_last() -> None:
    for name in CHOICES:
        assert variants(named(name))[-1] == named(name)
    assert {each.batch_size for each in variants(replace(named("demo"), batch_size=32))} == {32}


def test_the_recipe_that_auto_made_is_kept_as_it_is() -> None:
    for name in CHOICES:
        made = variants(named(name))[0]
        assert choose(made, seen=1000) is None
        assert variants(made) == [made]


def test_settings_that_no_choice_goes_with_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="may choose SimCLR for demo, which does not go with its settings"):
        choose(replace(named("demo"), lagged_target=True), seen=1000)
