"""Ranges that settings have in common; they hold for flags, RECIPE+setting=value, presets and files alike."""

from __future__ import annotations

import os

from fastbyol.errors import require

FLOAT32_SAFE = 1e30  # a rate or weight, also scaled by the batch, is finite in float32
EPOCHS_MAX = 10**9
SECONDS_MAX = 250_000_000_000  # as a Unix time it is in the year 9892, and datetime ends with 9999
COUNT_MAX = 10**9
SIDE_MAX = 4096  # pixels of a view
SIZE_MAX = 10**6  # dimensions of a layer
WIDTH_MAX = 1000
LR_SCALE_MAX = 10**6  # times the largest rate it is finite in float32
VIEWS_MAX = 100
BATCHES_MAX = 10_000  # decoded in advance, or of a recalibration
THREADS_MAX = 1024  # with a hundred million torch dies of a segmentation fault


def check_number(name: str, value: float, least: float, most: float, *, is_above: bool = False) -> None:
    """Raise ConfigError unless least <= value <= most, or least < value where `is_above`; NaN never is."""
    holds = (least < value if is_above else least <= value) and value <= most
    wanted = f"above {least}, at most {most}" if is_above else f"from {least} to {most}"
    require(holds, f"{name} is {value}; give a number {wanted}")


def check_text(name: str, text: str | None) -> None:
    """Raise ConfigError for a text that no path and no other program's argument can hold: with NUL, or no Unicode."""
    try:
        holds = text is None or b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        holds = False
    require(holds, f"{name} is {text!r}; give one without NUL that this system can write as a path")
