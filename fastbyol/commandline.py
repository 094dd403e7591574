"""Shared parts of the command lines: one-line errors, exit statuses, argument types and help texts."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

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
