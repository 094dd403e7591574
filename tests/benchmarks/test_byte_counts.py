"""Laws of the byte counts: the formula agrees with what the code launches, for every way of running a step."""

from __future__ import annotations

import pytest

from benchmarks import byte_counts
from benchmarks.byte_counts import COMBINATIONS, WITHIN, compare, weights_line
from benchmarks.document import DOCUMENT
from benchmarks.roofline import TODAY, Switches
from benchmarks.traffic import effects
from fastbyol.kernels import batchnorm, batchnorm_pool, pointwise


def pointers(names: frozenset[str]) -> set[str]:
    return {name for name in names if name.endswith("_ptr")}  # offsets that are added to them have no size


def test_a_kernel_reads_and_writes_what_its_source_loads_and_stores() -> None:
    channel = {"mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr"}
    apply, pool = effects(batchnorm.apply_kernel.fn), effects(batchnorm_pool.norm_pool_backward_kernel.fn)
    assert pointers(apply.read) == {"x_ptr", "residual_ptr", *channel}
    assert pointers(apply.written) == {"z_ptr", "mask_ptr"}
    assert pointers(pool.read) == {"dz_ptr", "other_dz_ptr", "place_ptr", "x_ptr", "sums_ptr", *channel}
    assert pointers(pool.written) == {"dx_ptr"}
    product = effects(pointwise.pointwise_kernel.fn)
    assert {"x", "weight", "running_mean_ptr"} <= product.read
    assert product.written >= {"y", "partial_ptr"}


@pytest.mark.parametrize(
    "switches", [None, TODAY, Switches(joins=False, pools=False, folds_stem=False, target="running")], ids=str
)
def test_the_formula_agrees_with_the_code_for_a_resnet18(switches: Switches | None) -> None:
    found = compare("resnet18", "imagenet", 224, switches)
    assert abs(found.difference) <= WITHIN, found


def test_the_formula_of_weights_agrees_with_lars_and_casts_of_a_resnet18() -> None:
    assert abs(weights_line("resnet18", "imagenet")[1]) <= WITHIN


@pytest.mark.slow
def test_the_formula_of_weights_agrees_with_the_code_and_the_document() -> None:
    found, difference = weights_line("resnet50", "imagenet")
    assert abs(difference) <= WITHIN
    assert found in DOCUMENT.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "switches"), COMBINATIONS.items(), ids=[*COMBINATIONS])
def test_the_formula_agrees_with_the_code_and_the_document(name: str, switches: Switches | None) -> None:
    found = compare("resnet50", "imagenet", 224, switches)
    assert abs(found.difference) <= WITHIN, found
    table = DOCUMENT.read_text().split(byte_counts.BEGIN)[1].split(byte_counts.END)[0]
    assert byte_counts.line(name, found) in table
