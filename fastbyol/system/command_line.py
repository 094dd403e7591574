"""Shared parts of the command lines: one-line errors, exit statuses, argument types and help texts."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from fastbyol.system.limits import available_cores


def positive_number(text: str) -> float:
    """Parse a number above 0."""
    return _number(text, "more than 0", lambda value: value > 0)


def proper_fraction(text: str) -> float:
    """Parse a number strictly between 0 and 1."""
    return _number(text, "between 0 and 1", lambda value: 0 < value < 1)


def nonnegative_number(text: str) -> float:
    """Parse a number of at least 0."""
    return _number(text, "of at least 0", lambda value: value >= 0)


def _number(text: str, wanted: str, is_valid: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_valid(value)):
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a number {wanted}")
    return value


THREADS = (
    "threads that compute, on a CPU (default: OMP_NUM_THREADS, which torchrun sets; else the fastest, by measuring)"
)
WORKERS = "decoding threads (default: the cores of this rank less 2 on cuda, 2 on a CPU)"


DONE, RANK_LOST, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 75


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the error as one line and exit."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def fail(command: str, error: Exception, *, status: int) -> int:
    """Print an exception as one line on stderr and return the status."""
    print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def seed(text: str) -> int:
    """Parse a seed, from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a whole number from 0 to 2^63 - 1")
    return int(text)


def whole_number(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a whole number from 1")
    return int(text)


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
