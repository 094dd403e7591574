"""Know how arguments that several commands share are read and checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from fastbyol.cgroups import available_cores


def add_workers(command: argparse.ArgumentParser) -> None:
    """Declare --workers: by default all cores this process may use, since nothing else is done meanwhile."""
    command.add_argument(
        "--workers", type=at_least(1), default=available_cores(), metavar="N", help="threads (default: one a core)"
    )


def add_overwrite(command: argparse.ArgumentParser) -> None:
    """Declare --overwrite."""
    command.add_argument("--overwrite", action="store_true", help="replace existing output")


def at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: a whole number from low to high."""

    def number(text: str) -> int:
        wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} given; wanted {wanted}")
        return int(text)

    return number


def share(text: str) -> float:
    """Read a share from 0 to 1, an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a number from 0 to 1")
    return number
