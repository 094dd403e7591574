"""Laws of the schedules: exact ends, one peak, the paper's formula between."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fastbyol.config import CropRamp, ObjectiveConfig, Preset
from fastbyol.recipes import named
from fastbyol.schedule import beta, build, crop_px, ema_rate, learning_rate, peaks, relative_cost


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.5])
def test_learning_rate_ends_at_exactly_zero(warmup: float) -> None:
    assert learning_rate(1.0, peak=7.2, warmup=warmup) == 0.0


@pytest.mark.parametrize("base", [0.0, 0.97, 0.996, 1.0])
def test_ema_rate_runs_from_its_base_to_exactly_one(base: float) -> None:
    assert ema_rate(0.0, base=base) == pytest.approx(base, abs=1e-15)
    assert ema_rate(1.0, base=base) == 1.0
    assert ema_rate(0.5, base=base) == pytest.approx((1 + base) / 2)


def test_learning_rate_rises_to_its_peak_and_falls_by_half_a_cosine() -> None:
    assert learning_rate(0.0, peak=2.0, warmup=0.1) == 0.0
    assert learning_rate(0.05, peak=2.0, warmup=0.1) == pytest.approx(1.0)
    assert learning_rate(0.1, peak=2.0, warmup=0.1) == 2.0
    assert learning_rate(0.4, peak=2.0, warmup=0.1) == pytest.approx(1 + math.cos(math.pi / 3))


def test_without_warmup_the_peak_comes_first() -> None:
    assert learning_rate(0.0, peak=2.0, warmup=0.0) == 2.0


def test_rates_are_monotone() -> None:
    steps = [k / 1000 for k in range(1001)]
    taus = [ema_rate(p, base=0.99) for p in steps]
    falling = [learning_rate(p, peak=1.0, warmup=0.2) for p in steps if p >= 0.2]
    assert taus == sorted(taus)
    assert falling == sorted(falling, reverse=True)


PRESETS = (Preset(40, 0.45, 0.97), Preset(100, 0.45, 0.99), Preset(300, 0.3, 0.99), Preset(1000, 0.2, 0.996))
RECIPE = replace(named("demo"), presets=PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_own_length_gets_its_own_peaks(preset: Preset) -> None:
    assert peaks(RECIPE, epochs=preset.epochs) == pytest.approx((preset.base_lr, preset.tau_base))


def test_peaks_lie_between_their_neighbours_and_hold_outside() -> None:
    base_lr, tau_base = peaks(RECIPE, epochs=math.sqrt(300 * 1000))
    assert base_lr == pytest.approx(0.25)
    assert 1 - tau_base == pytest.approx(math.sqrt(0.01 * 0.004))
    assert peaks(RECIPE, epochs=1) == pytest.approx((0.45, 0.97))
    assert peaks(RECIPE, epochs=1e6) == pytest.approx((0.2, 0.996))


def test_a_recipe_without_presets_keeps_its_peaks() -> None:
    recipe = named("demo")
    assert peaks(recipe, epochs=1e6) == (recipe.optim.base_lr, recipe.optim.tau_base)


def test_a_crop_ramp_climbs_to_full_size_and_stays() -> None:
    ramp = CropRamp.between(128, 224)
    assert ramp.sizes_px == (128, 160, 192)
    sizes = [crop_px(progress / 100, full_px=224, ramp=ramp) for progress in range(101)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {128, 160, 192, 224}
    assert sizes.index(224) == 100 * ramp.until
    assert [sizes.count(px) for px in ramp.sizes_px] == [20, 20, 20]


def test_relative_cost_is_the_mean_of_the_ramps_pixels() -> None:
    recipe = replace(named("demo"), crop_ramp=CropRamp((12,), until=0.5))
    assert relative_cost(recipe) == 0.5 * (12 / 24) ** 2 + 0.5
    assert relative_cost(named("demo")) == 1
    made = build(recipe, epochs=2)
    assert (made.crop_px(0.0), made.crop_px(0.49), made.crop_px(0.5), made.crop_px(1.0)) == (12, 12, 24, 24)


def test_beta_fades_by_half_a_cosine_and_stays_at_its_end() -> None:
    objective = ObjectiveConfig(beta=1.0, fade=0.4, beta_end=0.2)
    assert beta(0.0, objective=objective) == 1.0
    assert beta(0.2, objective=objective) == pytest.approx(0.6)
    assert [beta(progress, objective=objective) for progress in (0.4, 0.7, 1.0)] == [0.2] * 3
    assert beta(0.5, objective=ObjectiveConfig(beta=0.7)) == 0.7
