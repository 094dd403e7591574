"""Laws of the watchdogs: a run of skipped steps ends a run, one does not; collapse is reported, and may end it."""

from __future__ import annotations

import math

import pytest

from fastbyol.monitor.watchdog import COLLAPSED, SKIPS_MAX, STRETCH, Diverged, Watchdog

HEALTHY = 1 / math.sqrt(256)


def look(
    dog: Watchdog, progress: float, *, std: float = HEALTHY, loss: float = 1.0, skipped: int | None = 0
) -> str | None:
    return dog.inspect(
        step=int(1000 * progress), progress=progress, loss=loss, embedding_std=std, skipped_in_a_row=skipped
    )


def test_a_healthy_run_hears_nothing() -> None:
    dog = Watchdog(dimensions=256, stops_on_collapse=True)
    assert [look(dog, progress / 100) for progress in range(101)] == [None] * 101


def test_a_few_skipped_steps_are_borne_and_a_run_of_them_ends_it() -> None:
    dog = Watchdog(dimensions=256, stops_on_collapse=False)
    assert look(dog, 0.1, loss=math.nan, skipped=SKIPS_MAX - 1) is None
    assert look(dog, 0.2) is None
    with pytest.raises(Diverged, match="lower --base-lr"):
        look(dog, 0.3, skipped=SKIPS_MAX)


def test_an_optimiser_that_skips_nothing_ends_at_the_first_nan() -> None:
    with pytest.raises(Diverged, match="loss is nan"):
        look(Watchdog(dimensions=256, stops_on_collapse=False), 0.1, loss=math.nan, skipped=None)


def test_collapse_is_told_once_after_its_stretch() -> None:
    dog, low = Watchdog(dimensions=256, stops_on_collapse=False), 0.9 * COLLAPSED * HEALTHY
    said = [look(dog, progress / 100, std=low) for progress in range(100)]
    assert [bool(text) for text in said].index(True) == round(100 * STRETCH)
    assert sum(bool(text) for text in said) == 1
    assert "--stop-on-collapse" in str(next(filter(None, said)))


def test_a_recovery_begins_the_stretch_anew() -> None:
    dog = Watchdog(dimensions=256, stops_on_collapse=True)
    for progress in range(100):
        look(dog, progress / 100, std=HEALTHY if progress % 4 == 0 else 0.0)


def test_collapse_ends_the_run_where_asked() -> None:
    dog = Watchdog(dimensions=256, stops_on_collapse=True)
    look(dog, 0.5, std=0.0)
    with pytest.raises(Diverged, match="collapsed"):
        look(dog, 0.5 + STRETCH, std=0.0)
