"""Laws of the schedules: exact ends, one peak, the paper's formula between."""

from __future__ import annotations

import math

import pytest

from fastbyol.schedule import ema_rate, learning_rate


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
