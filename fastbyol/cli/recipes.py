"""The table of all recipes that fastbyol-train --recipes prints."""

from __future__ import annotations

from fastbyol.config import EncoderConfig
from fastbyol.recipes import RECIPES
from fastbyol.recipes.purpose import PURPOSES

HEADER = ("recipe", "data", "network", "epochs", "px", "batch")
ENDING = """\
Epochs: the length the constants were chosen for. px: side of a training view.
--epochs, --budget and --batch-size change them; so does RECIPE+setting=value."""


def format_recipes() -> str:
    """Format all recipes as a table, grouped by the hardware that they are meant for."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, build in RECIPES.items():
        recipe, purpose = build(), PURPOSES[name]
        numbers = (f"{recipe.epochs:g}", str(recipe.crop_px), str(recipe.batch_size))
        groups.setdefault(purpose.hardware, []).append((name, purpose.data, _network(recipe.encoder), *numbers))
    rows = [HEADER, *(row for group in groups.values() for row in group)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(HEADER, widths)]
    for hardware, group in groups.items():
        lines += ["", f"{hardware}:", *(_line(row, widths) for row in group)]
    return "\n".join([*lines, "", ENDING])


def _network(encoder: EncoderConfig) -> str:
    return encoder.arch if encoder.width == 1 else f"{encoder.arch} x{encoder.width:g}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """Align the words of a row to the left and its numbers, the last three, to the right."""
    cells = [
        cell.ljust(width) if column < 3 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"  {'  '.join(cells)}"
