"""The list of all settings that fastbyol-train --settings prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from fastbyol.config import Config, Recipe
from fastbyol.recipe import EncoderConfig, HeadConfig, ObjectiveConfig, OptimConfig, ViewConfig
from fastbyol.recipes.settings import TABLES, About
from fastbyol.system.command_line import format_list

KINDS = {
    "": Config,
    "recipe": Recipe,
    "recipe.encoder": EncoderConfig,
    "recipe.head": HeadConfig,
    "recipe.views": ViewConfig,
    "recipe.optim": OptimConfig,
    "recipe.objective": ObjectiveConfig,
}
BEGINNING = """\
Settings of a run, as a file for --config has them. P is the paper (arXiv 2006.07733v3), DM its authors' code.
Those of the recipe and of its parts but views can be changed as RECIPE+setting=value, too; RECIPE+global_views=4 has
its views in turn, four in all, and RECIPE+local_views=4 four small ones besides (+local_px=PX for their side)."""
ENDING = """\
RECIPE --settings shows the values of a recipe; --save-config FILE writes a file to change."""


def format_settings(recipe: Recipe | None) -> str:
    """Format every setting with its meaning, values and source; the values of a recipe, or else the defaults."""
    parts = [BEGINNING]
    for path, table in TABLES.items():
        is_list = path in ("recipe.views", "recipe.presets")
        title = "the run, above all tables" if not path else f"[[{path}]]" if is_list else f"[{path}]"
        for note, now in _values(path, recipe):
            parts.append(f"\n{title}{note}\n{format_list(_rows(table, now))}")
    return "\n".join([*parts, "", ENDING])


def _rows(table: Mapping[str, About], now: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of each setting by its name, with its value where it has one."""
    known = {name: f"{name} = {_shown(value)}" for name, value in now.items() if value is not None}
    return {known.get(name, name): str(about) for name, about in table.items()}


def _values(path: str, recipe: Recipe | None) -> list[tuple[str, dict[str, Any]]]:
    """Return the values of a table by name, each time with a note: each view of a recipe has its own."""
    if recipe is None or not path:
        kind = KINDS.get(path)
        known = [] if kind is None else [field for field in fields(kind) if field.default is not MISSING]
        return [("", {field.name: field.default for field in known if field.default != ()})]
    whole: Any = asdict(recipe)
    for name in path.split(".")[1:]:
        whole = whole[name]
    if path == "recipe.views":
        return [(f", view {number} of {len(whole)}", view) for number, view in enumerate(whole, start=1)]
    return [("", {} if whole is None or isinstance(whole, list | tuple) else whole)]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
