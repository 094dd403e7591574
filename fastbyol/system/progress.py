"""Progress of long work on stderr: a bar on a terminal, lines with the time to go in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SHOWN_AFTER_S = 2.0
FIRST_LINE_S, LINE_EVERY_S = 10.0, 30.0  # without a terminal
LINE = "{desc}: {percentage:.0f} % of {total_fmt} {unit}, {remaining} left"


class Progress(tqdm):  # type: ignore[type-arg]  # of any items
    """tqdm's bar, from SHOWN_AFTER_S on; where stderr is no terminal, a line after FIRST_LINE_S, then now and then."""

    def __init__(
        self, items: Iterable[Any] | None = None, *, total: int, desc: str, unit: str, initial: int = 0
    ) -> None:
        self._has_terminal = sys.stderr.isatty()
        # miniters 1: tqdm's monitor, which draws a bar anew, leaves a line alone
        lines = {} if self._has_terminal else {"bar_format": LINE, "mininterval": LINE_EVERY_S, "miniters": 1}
        settings: dict[str, Any] = {"delay": SHOWN_AFTER_S, "leave": False, "file": sys.stderr, **lines}
        super().__init__(items, total=total, desc=desc, unit=unit, initial=initial, **settings)
        if not self._has_terminal and not self.disable:  # as TQDM_DISABLE does
            self.last_print_t -= LINE_EVERY_S - FIRST_LINE_S

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]  # as tqdm does
        """Draw the bar, or print the line; an empty `msg` is to clear the bar."""
        if self._has_terminal:
            super().display(msg, pos)
        elif msg != "":
            print(self, file=sys.stderr, flush=True)
        return self._has_terminal
