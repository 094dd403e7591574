"""Laws of the scaling on paper: its all-reduces are those of real ranks, whose CPU time it predicts."""

from __future__ import annotations

import json
from dataclasses import astuple

import pytest

from benchmarks import ranks, scaling
from benchmarks.document import DOCUMENT
from fastbyol.recipes import named

ROWS = [json.loads(line) for line in scaling.MEASURED.read_text().splitlines()]


def test_the_all_reduces_are_those_that_ranks_made() -> None:
    sizes = scaling.shared_statistics(named(ranks.RECIPE))
    assert [row["ranks"] for row in ROWS] == list(ranks.RANKS)
    for row in ROWS:
        assert (len(sizes), sum(sizes)) == (row["all_reduces"], row["all_reduced_bytes"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['ranks']} ranks")
def test_the_sum_of_work_and_all_reduces_predicts_measured_ranks(row: dict[str, float]) -> None:
    assert row["predicted_ms"] == pytest.approx(row["cpu_ms"], rel=scaling.WITHIN)


def test_more_gpus_share_a_batch_faster_and_less_well() -> None:
    recipe = named("imagenet_rn50")
    statistics, gradients = scaling.shared_statistics(recipe), scaling.gradient_bytes(recipe)
    steps = [scaling.predict(gpus, 4096, statistics, gradients) for gpus in (8, 16, 32, 64, 128, 256)]
    assert all(min(astuple(step)) >= 0 for step in steps)
    rates = [step.images_per_s for step in steps]
    assert rates == sorted(rates)
    efficiencies = [step.efficiency for step in steps]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert max(efficiencies) < 1


def test_one_gpus_step_is_the_measured_one() -> None:
    work_s = scaling.FIXED_S + scaling.STEP_IMAGES * scaling.PER_IMAGE_S
    assert work_s == pytest.approx(scaling.STEP_S)
    file = scaling.MEASURED.parents[1] / "gpu.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    found = [row for row in kept if row["case"] == "step" and row["commit"] == "80c0cd0" and row["p50_ms"]]
    times = [row["p50_ms"] for row in found if row["implementation"] == "fastbyol, graph" and "rn50" in row["shape"]]
    assert times == pytest.approx([1000 * scaling.STEP_S], rel=1e-4)


def test_the_document_holds_the_tables() -> None:
    text = DOCUMENT.read_text().split(scaling.BEGIN)[1].split(scaling.END)[0]
    assert text.strip() == scaling.markdown()
