"""Know how a recipe is changed by text: setting=value+setting=value."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from fastbyol.config import ConfigError, Recipe, ViewConfig

# What each named set of views leaves out of the first and of the second view. Source: paper, appendix F.3, table 17.
LEFT_OUT: dict[str, tuple[str, str]] = {
    "no_flip": ("flip", "flip"),
    "no_blur": ("blur", "blur"),
    "no_color": ("jitter grayscale", "jitter grayscale"),
    "no_jitter": ("jitter", "jitter"),
    "no_grayscale": ("grayscale", "grayscale"),
    "no_second_blur": ("", "blur"),
    "no_solarize": ("", "solarize"),
    "no_second_blur_or_solarize": ("", "blur solarize"),
    "crop": ("flip jitter grayscale blur solarize",) * 2,
    "crop_flip": ("jitter grayscale blur solarize",) * 2,
    "crop_color": ("flip blur solarize",) * 2,
    "crop_blur": ("flip jitter grayscale solarize",) * 2,
}
SYMMETRIC: dict[str, Any] = {"blur": 0.5, "solarize": 0.2}  # both views
VIEWS = (*LEFT_OUT, "symmetric")


def changed(recipe: Recipe, change: str) -> Recipe:
    """Change settings of a recipe by text such as "target=constant+base_lr=0.1"; its name tells them.

    Every number, word and yes-or-no of the recipe and its parts is a setting under its own name, and views=NAME one of
    VIEWS. Raises ConfigError for what is no setting, or no value of it.
    """
    own: dict[str, Any] = {"name": f"{recipe.name}+{change}"}
    parts: dict[str, dict[str, Any]] = {}
    known = settings(recipe)
    for assignment in change.split("+"):
        name, equals, text = assignment.partition("=")
        if not equals or name not in {*known, "views"}:
            raise ConfigError(
                f"{assignment!r} changes nothing of a recipe; give setting=value, with one of views, {', '.join(known)}"
            )
        if name == "views":
            own["views"] = _views(recipe.views, text)
            continue
        part, before = known[name]
        (own if part is None else parts.setdefault(part, {}))[name] = _value(name, text, before)
    if parts.get("optim", {}).keys() & {"base_lr", "tau_base"}:
        own["presets"] = ()  # peaks given hold for any length
    own |= {part: replace(getattr(recipe, part), **values) for part, values in parts.items()}
    return replace(recipe, **own)


def settings(recipe: Recipe) -> dict[str, tuple[str | None, Any]]:
    """Map each setting's name to the part of the recipe it stands in, None for the recipe itself, and its value."""
    found: dict[str, tuple[str | None, Any]] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            found |= {inner.name: (field.name, getattr(value, inner.name)) for inner in dataclasses.fields(value)}
        elif field.name != "name":
            found[field.name] = (None, value)
    return {name: place for name, place in found.items() if isinstance(place[1], bool | int | float | str)}


def _value(name: str, text: str, before: Any) -> Any:
    if isinstance(before, bool):
        if text not in ("true", "false"):
            raise ConfigError(f"{name}={text}: give true or false")
        return text == "true"
    kind = float if isinstance(before, float) or name in ("width", "epochs", "warmup_epochs") else type(before)
    try:
        return kind(text)
    except ValueError as error:
        wanted = "whole number" if kind is int else "number"
        raise ConfigError(f"{name}={text}: give a {wanted}, such as {before}") from error


def _views(views: tuple[ViewConfig, ViewConfig], name: str) -> tuple[ViewConfig, ViewConfig]:
    first, second = views
    if name == "symmetric":
        return replace(first, **SYMMETRIC), replace(second, **SYMMETRIC)
    if name not in LEFT_OUT:
        raise ConfigError(f"views={name}: give one of {', '.join(VIEWS)}")
    return _without(first, LEFT_OUT[name][0]), _without(second, LEFT_OUT[name][1])


def _without(view: ViewConfig, names: str) -> ViewConfig:
    never: dict[str, Any] = dict.fromkeys(names.split(), 0.0)
    return replace(view, **never)
