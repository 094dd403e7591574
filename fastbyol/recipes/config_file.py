"""A run's settings as a file: TOML with a comment on every setting, or JSON, such as the config.json of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fastbyol import tables
from fastbyol.budget import check_budget, parse_budget
from fastbyol.config import Config, Recipe, in_place
from fastbyol.errors import ConfigError, require
from fastbyol.recipes.settings import SETTINGS
from fastbyol.recipes.tables import recipe_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LENGTHS = ("budget_s", "deadline", "epochs")  # of Config, of which a run has one
LENGTHS_OF_FILE = ("budget", *LENGTHS)
RUN_FOLDER = "config.json"


def load(path: Path, changes: Mapping[str, Any]) -> Config:
    """Build the configuration of a file with some settings replaced; see Config.from_file."""
    settings = replaced(read(path), changes)
    for name in ("recipe", "data"):
        require(name in settings, f"{path} has no {name}; give it there, or among the changes")
    return Config(**timed(settings))


def timed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as arguments of Config: `budget` becomes a length, for which "slurm" asks Slurm now."""
    check_length(settings)
    given = {name: value for name, value in settings.items() if name != "budget"}
    return given if settings.get("budget") is None else given | parse_budget(settings["budget"])._asdict()


def replaced(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace settings by others: a length replaces any other, and without one the recipe's own holds."""
    kept = {name: value for name, value in settings.items() if not (has_length(changes) and name in LENGTHS_OF_FILE)}
    whole = {**kept, **changes}
    if "recipe" in whole and not has_length(whole):
        recipe = whole["recipe"]
        whole["epochs"] = (recipe if isinstance(recipe, Recipe) else recipe_of(recipe)).epochs
    return whole


def has_length(settings: Mapping[str, Any]) -> bool:
    """Tell whether settings say how long a run is."""
    return any(settings.get(name) is not None for name in LENGTHS_OF_FILE)


def check_length(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where settings say more than once how long a run is."""
    given = [name for name in LENGTHS_OF_FILE if settings.get(name) is not None]
    require(len(given) <= 1, f"{' and '.join(given)} each say how long the run is; give one of them")


def read(path: Path) -> dict[str, Any]:
    """Read the settings of a file, or of a run's folder, as arguments of Config, which may lack some.

    The recipe is built; `budget` stays the text of the command line, for `timed`. Raises ConfigError, which names the
    file and the setting; OSError.
    """
    if path.is_dir():
        path = path / RUN_FOLDER
    try:
        return _arguments(in_place(_parse(path)))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _parse(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    require(isinstance(found, dict), f"it holds a {type(found).__name__}; wanted settings by their names")
    assert isinstance(found, dict)
    return found


def _arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    tables.check_names(table, known=[*(field.name for field in fields(Config)), "budget"])
    given = {name: value for name, value in table.items() if name not in ("recipe", "budget")}
    settings = tables.some_values(Config, given)
    if "recipe" in table:
        settings["recipe"] = recipe_of(table["recipe"])
    if "budget" in table:
        require(isinstance(table["budget"], str), f'budget is {table["budget"]!r}; give a text, such as "8h"')
        check_budget(table["budget"])
        settings["budget"] = table["budget"]
    check_length(settings)
    return settings


def formatted(path: Path, settings: Mapping[str, Any]) -> str:
    """Format arguments of Config as a file of this name that `read` takes: JSON where it ends so, else TOML."""
    plain = {name: asdict(value) if name == "recipe" else value for name, value in settings.items()}
    return json.dumps(plain, indent=2) + "\n" if path.suffix == ".json" else to_toml(plain)


def to_toml(table: Mapping[str, Any]) -> str:
    """Format settings as TOML, each under a comment on what it means; what is None or empty is left out."""
    return "\n".join(_lines(table, "")) + "\n"


def _lines(table: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the values of a table, then the tables within it."""
    inner = {name: value for name, value in table.items() if _is_table(value) or _is_list_of_tables(value)}
    for name, value in table.items():
        if name not in inner and value is not None and value != ():
            yield f"# {SETTINGS[f'{path}{name}']}"
            yield f"{name} = {_text(value)}"
    for name, value in inner.items():
        for each in [value] if _is_table(value) else value:
            yield ""
            yield f"[{path}{name}]" if _is_table(value) else f"[[{path}{name}]]"
            yield from _lines(each, f"{path}{name}.")


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_list_of_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, dict) for each in value)


def _text(value: object) -> str:
    """Write a value: numbers, true and false as in JSON and Python, texts as in JSON but for the delete character."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{value!r} is no Unicode, as TOML wants; give a name that ends in .json") from error
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
