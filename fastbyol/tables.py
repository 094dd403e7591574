"""Dataclasses from nested tables of plain values, as JSON and TOML hold them, with names and types checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fastbyol.errors import ConfigError, require

T = TypeVar("T")
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}


def build(kind: type[T], table: Mapping[str, Any], *, path: str = "") -> T:
    """Build a dataclass, and the dataclasses within it; path: of the table in its file, with a dot at its end.

    Raises ConfigError, which names the setting, where one is unknown, missing, of another type or out of range.
    """
    return kind(**values(kind, table, path=path))


def values(kind: type[Any], table: Mapping[str, Any], *, path: str = "") -> dict[str, Any]:
    """Return the arguments of a dataclass from a table; see build."""
    found = some_values(kind, table, path=path)
    for field in dataclasses.fields(kind):
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(not is_required or field.name in table, f"setting {path}{field.name} is missing; give it a value")
    return found


def some_values(kind: type[Any], table: Mapping[str, Any], *, path: str = "") -> dict[str, Any]:
    """Return the arguments that a table holds; those that the dataclass needs, too, may be missing."""
    hints = get_type_hints(kind)
    check_names(table, known=hints, path=path)
    return {name: _value(hints[name], value, f"{path}{name}") for name, value in table.items()}


def check_names(names: Iterable[str], *, known: Iterable[str], path: str = "") -> None:
    """Raise ConfigError for the first name that is not known, with the nearest one that is."""
    settings = list(known)
    for name in names:
        if name not in settings:
            alike = difflib.get_close_matches(name, settings, n=1, cutoff=0.0)
            raise ConfigError(f"no setting is named {path}{name}; the nearest is {path}{alike[0]}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of a table by those of another, and where both have a table, by the same rule within it."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _value(hint: Any, value: Any, name: str) -> Any:
    """Return a value as the type says; a dataclass from its table, a tuple from a list."""
    if get_origin(hint) in (types.UnionType, Union):
        (inner,) = (each for each in get_args(hint) if each is not types.NoneType)
        return None if value is None else _value(inner, value, name)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), f"{name} is {value!r}; give a table of its settings")
        return build(hint, value, path=f"{name}.")  # type: ignore[arg-type]  # hint is a type
    if get_origin(hint) is tuple:
        return _tuple(get_args(hint), value, name)
    accepted = {float: (int, float)}.get(hint, (hint,))
    is_right = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    require(is_right, f"{name} is {value!r}; give {NAMES[hint]}")
    return value


def _tuple(hints: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    """Return a tuple from a list; hints: of each entry, or one and an ellipsis."""
    require(isinstance(value, list | tuple), f"{name} is {value!r}; give a list, such as [1, 2]")
    if hints[-1] is not Ellipsis:
        require(len(value) == len(hints), f"{name} has {len(value)} entries; give {len(hints)}")
    each = [hints[0]] * len(value) if hints[-1] is Ellipsis else hints
    return tuple(_value(hint, entry, name) for hint, entry in zip(each, value, strict=True))
