"""The document with the generated tables, each between two markers."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def put(text: str, document: Path, begin: str, end: str) -> None:
    """Replace what stands between two markers of a document; raise ValueError unless each stands there once."""
    before, rest = document.read_text().split(begin)
    _, after = rest.split(end)
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
