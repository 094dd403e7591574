"""Command-line arguments and their types, shared by several commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from fastbyol.cgroups import available_cores


def add_workers(command: argparse.ArgumentParser) -> None:
    """Add --workers, by default all cores this process may use, since it does nothing else meanwhile."""
    command.add_argument(
        "--workers", type=int_range(1), default=available_cores(), metavar="N", help="threads (default: one a core)"
    )


def add_overwrite(command: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    command.add_argument("--overwrite", action="store_true", help="replace existing output")


def int_range(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from low to high."""

    def number(text: str) -> int:
        wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} given; wanted {wanted}")
        return int(text)

    return number


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a number from 0 to 1")
    return number
