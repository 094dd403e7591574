"""Paths and addresses as words of a command line."""

from __future__ import annotations

import shlex
from pathlib import Path


def operand(place: str | Path) -> str:
    """Return a path or an address as a command takes it: -photos as ./-photos, which is no flag."""
    text = str(place)
    return f"./{text}" if text.startswith("-") else text


def quoted(place: str | Path) -> str:
    """Return a path or an address as one types it after a command, or after a flag, in a shell."""
    return shlex.quote(operand(place))
