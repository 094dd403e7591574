"""The scores of fastbyol-eval in the report of the run they belong to, which was written before them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastbyol.storage import files
from fastbyol.storage.pages import render

BEGIN, END = "<!-- scores since the run -->", "<!-- end of the scores -->"  # in report.html, around their place


def show(path: Path, scores: Sequence[tuple[str, str]]) -> bool:
    """Put scores, each with what it is about, in place of those that the page shows; False where it has no such place.

    Raises OSError, also where there is no page.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        return False
    shown = render(Path(__file__).with_name("evaluations.html"), {"scores": scores})
    files.write(path, "".join((before, begin, shown, end, after)))
    return True
