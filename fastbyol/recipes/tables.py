"""A recipe from the table of a configuration file: whole, or as changes to one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import cycle
from typing import Any

from fastbyol import tables
from fastbyol.config import OptimConfig, Recipe
from fastbyol.errors import ConfigError, require
from fastbyol.recipes import named
from fastbyol.recipes.overrides import with_peaks


def recipe_of(table: object) -> Recipe:
    """Build a recipe from its name, NAME or NAME+setting=value, or from a table of its settings.

    A table with `base`, the name of a recipe, changes that one; without, it holds every setting that has no default.
    Its `views` are a table for all views, or a list of a table for each; a longer list than the recipe's changes its
    views in turn. A peak rate that it changes holds for runs of any length. Raises ConfigError.
    """
    if isinstance(table, str):
        return named(table)
    require(isinstance(table, Mapping), f"recipe is {table!r}; give the name of a recipe, or a table of its settings")
    assert isinstance(table, Mapping)
    if "base" not in table:
        return tables.build(Recipe, table, path="recipe.")
    if not isinstance(table["base"], str):
        raise ConfigError(f"recipe.base is {table['base']!r}; give the name of a recipe")
    return _changed(named(table["base"]), {name: value for name, value in table.items() if name != "base"})


def _changed(base: Recipe, changes: dict[str, Any]) -> Recipe:
    whole = asdict(base)
    views = changes.pop("views", {})
    each = [views] * len(base.views) if isinstance(views, Mapping) else views
    require(
        isinstance(each, list) and len(each) >= 2 and all(isinstance(view, Mapping) for view in each),
        f"recipe.views is {views!r}; give a table of settings for all views, or a list of two or more",
    )
    whole["views"] = [tables.merge(view, changed) for view, changed in zip(cycle(whole["views"]), each)]
    optim = changes.get("optim", {})
    if "presets" not in changes and isinstance(optim, Mapping):
        given = tables.some_values(OptimConfig, optim, path="recipe.optim.")
        peaks = {name: given.get(name) for name in ("base_lr", "tau_base")}
        whole["presets"] = [asdict(preset) for preset in with_peaks(base.presets, **peaks)]
    return tables.build(Recipe, tables.merge(whole, changes), path="recipe.")
