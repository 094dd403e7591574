"""Laws of the memory plan: what is predicted for a step, and how a step is split until it fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastbyol import memory
from fastbyol.config import ConfigError
from fastbyol.recipes import named

CARD_80 = memory.usable_bytes(round(78.5 * memory.GIB))  # an 80 GB card less what CUDA takes for itself


def small(**changes: object) -> object:
    recipe = named("demo+stem=imagenet")
    return replace(recipe, crop_px=64, **changes)


def test_a_resnet50_step_at_224_px_needs_what_its_tensors_are() -> None:
    """Convolutions' inputs and outputs are kept, once each, and nothing of the target: 37.0 GiB by hand.

    Outputs 6.1 + 3.8 + 2.7 + 0.8 + 0.4 of 1x1 up and shortcuts, 1.5 of the stem, 2.3 + 0.8 + 1.3 + ... between.
    """
    needed = memory.step_bytes(named("imagenet_rn50"), images=512, precision="bfloat16") / memory.GIB
    assert needed == pytest.approx(41.4, rel=0.01)


def test_recomputing_brings_it_under_40_gib() -> None:
    needed = memory.step_bytes(named("imagenet_rn50"), images=512, precision="bfloat16", recomputes=True) / memory.GIB
    assert needed < 40


def test_need_is_linear_in_images_and_halves_in_bfloat16() -> None:
    need = {
        (images, precision): memory.step_bytes(small(), images=images, precision=precision)
        for images in (64, 128, 192)
        for precision in ("float32", "bfloat16")
    }
    for precision in ("float32", "bfloat16"):
        steps = [need[128, precision] - need[64, precision], need[192, precision] - need[128, precision]]
        assert steps[0] == pytest.approx(steps[1], rel=1e-3)
        assert steps[0] > 0
    assert need[192, "float32"] - need[64, "float32"] == pytest.approx(
        2 * (need[192, "bfloat16"] - need[64, "bfloat16"]), rel=0.05
    )


def test_the_readmes_imagenet_line_fits_one_80_gb_card() -> None:
    found = memory.fit(named("imagenet_rn50"), images=4096, precision="bfloat16", usable_bytes=CARD_80)
    assert 4096 // found.parts >= 512
    assert found.step_bytes <= CARD_80 < found.whole_bytes
    said = str(found)
    assert f"{found.parts} micro-batches of {4096 // found.parts} images" in said
    assert f"batch norm's population is {4096 // found.parts} images, not 4096" in said
    assert "\n" not in said


def test_what_fits_is_not_split_and_says_so() -> None:
    found = memory.fit(named("imagenet_rn50_b512_e1000"), images=512, precision="bfloat16", usable_bytes=CARD_80)
    assert (found.parts, found.recomputes) == (1, False)
    assert "micro" not in str(found)


def test_splitting_stops_at_the_first_number_that_fits() -> None:
    recipe = small()
    one = memory.step_bytes(recipe, images=96, parts=1, precision="float32")
    for parts in (2, 3, 6):
        usable = memory.step_bytes(recipe, images=96, parts=parts, precision="float32")
        found = memory.fit(recipe, images=96, precision="float32", usable_bytes=usable)
        assert found.parts <= parts
        assert found.step_bytes <= usable < one
    least = memory.fit(recipe, images=96, precision="float32", usable_bytes=one, least_parts=5)
    assert least.parts == 6  # the next that divides 96


def test_what_cannot_be_split_is_refused_in_one_line() -> None:
    for recipe, why in ((small(), "smaller --batch-size"), (small(lagged_target=True), "lagged target")):
        with pytest.raises(ConfigError, match=why):
            memory.fit(recipe, images=96, precision="float32", usable_bytes=2**20)


def test_errors_of_the_gpus_libraries_count_as_out_of_memory() -> None:
    assert memory.is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not memory.is_out_of_memory(RuntimeError("expected a tensor"))
