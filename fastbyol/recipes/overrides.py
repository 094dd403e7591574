"""Changes to a recipe, written as setting=value+setting=value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, NamedTuple, get_type_hints

from fastbyol.config import EncoderConfig, Preset, Recipe, ViewConfig
from fastbyol.errors import ConfigError, require
from fastbyol.ranges import SIDE_MAX, VIEWS_MAX, check_number

# What each named set of views omits from the first and from the second view, and of more in turn. Source: paper,
# appendix F.3, table 17.
OMITTED: dict[str, tuple[str, str]] = {
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
SYMMETRIC: dict[str, Any] = {"blur": 0.5, "solarize": 0.2}  # all views
VIEWS = (*OMITTED, "symmetric")
COUNTS = {"global_views": 4, "local_views": 4, "local_px": 96}  # with an example
RANGES = {"global_views": (2, VIEWS_MAX), "local_views": (0, VIEWS_MAX), "local_px": (8, SIDE_MAX)}
OTHERS = ("views", *COUNTS, "encoder")  # settings that are no field of a recipe, see apply_change
LOCAL_AREA = (0.05, 0.14)  # of an image: SwAV, Caron et al. 2020
LOCAL_SIDE = 96 / 224  # of a global view's, likewise


def apply_change(recipe: Recipe, change: str) -> Recipe:
    """Change settings of a recipe by text such as "target=constant+base_lr=0.1", which is appended to its name.

    The settings are all fields of type bool, int, float or str of the recipe and its parts; views, one of VIEWS;
    global_views, local_views and local_px, see _counted; and encoder, which is arch with the default of every
    other setting of an encoder.
    Raises ConfigError for an unknown setting or a value of the wrong type.
    """
    own: dict[str, Any] = {"name": f"{recipe.name}+{change}"}
    parts: dict[str, dict[str, Any]] = {}
    known, counts = settings(recipe), dict[str, int]()
    for assignment in change.split("+"):
        name, equals, text = assignment.partition("=")
        if not equals or name not in {*known, *OTHERS}:
            raise ConfigError(
                f"{assignment!r} is not a setting; give setting=value, with one of {', '.join((*OTHERS, *known))}"
            )
        if name == "views":
            own["views"] = _views(recipe.views, text)
            continue
        if name in COUNTS:
            counts[name] = _value(name, text, Setting(None, COUNTS[name], int))
            continue
        if name == "encoder":
            own["encoder"] = EncoderConfig(text)
            continue
        part = known[name].part
        (own if part is None else parts.setdefault(part, {}))[name] = _value(name, text, known[name])
    if counts:
        own["views"] = _counted(own.get("views", recipe.views), counts, crop_px=own.get("crop_px", recipe.crop_px))
    peaks = {name: value for name, value in parts.get("optim", {}).items() if name in ("base_lr", "tau_base")}
    own["presets"] = with_peaks(recipe.presets, **peaks)
    own |= {part: replace(own.get(part, getattr(recipe, part)), **values) for part, values in parts.items()}
    return replace(recipe, **own)


def with_peaks(
    presets: tuple[Preset, ...], *, base_lr: float | None = None, tau_base: float | None = None
) -> tuple[Preset, ...]:
    """Replace the peaks of every preset by the given ones; None keeps each preset's own."""
    given = {name: value for name, value in (("base_lr", base_lr), ("tau_base", tau_base)) if value is not None}
    return tuple(replace(preset, **given) for preset in presets)


class Setting(NamedTuple):
    """The part of the recipe that holds a setting (None for the recipe itself), and the setting's value and type."""

    part: str | None
    value: Any
    kind: type


def settings(recipe: Recipe) -> dict[str, Setting]:
    """Return every setting of a recipe by name."""
    fields = [field.name for field in dataclasses.fields(recipe)]
    parts = {name: getattr(recipe, name) for name in fields if dataclasses.is_dataclass(getattr(recipe, name))}
    found: dict[str, Setting] = {}
    for part, holder in ((None, recipe), *parts.items()):
        for name, kind in get_type_hints(type(holder)).items():
            if kind in (bool, int, float, str) and (part, name) != (None, "name"):
                found[name] = Setting(part, getattr(holder, name), kind)
    return found


def _value(name: str, text: str, setting: Setting) -> Any:
    if setting.kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{name} is {text!r}; give true or false")
        return text == "true"
    try:
        return setting.kind(text)
    except ValueError as error:
        wanted = "whole number" if setting.kind is int else "number"
        raise ConfigError(f"{name} is {text!r}; give a {wanted}, such as {setting.value}") from error


def _counted(views: tuple[ViewConfig, ...], counts: Mapping[str, int], *, crop_px: int) -> tuple[ViewConfig, ...]:
    """Return so many global and local views, each the given ones of its kind in turn.

    Where none is local, local views are drawn like the global ones but from LOCAL_AREA, with a side of local_px or
    LOCAL_SIDE of crop_px, to 8 px.
    """
    whole = [view for view in views if view.local_px is None]
    local = [view for view in views if view.local_px is not None]
    number = counts.get("local_views", len(local))
    for name, count in counts.items():
        check_number(name, count, *RANGES[name])
    require(
        number > 0 or "local_px" not in counts,
        f"local_px is {counts.get('local_px')}, and there are no local views; give local_views=4, too",
    )
    kinds = local or [
        replace(view, area=LOCAL_AREA, local_px=max(round(LOCAL_SIDE * crop_px / 8) * 8, 8)) for view in whole
    ]
    if "local_px" in counts:
        kinds = [replace(view, local_px=counts["local_px"]) for view in kinds]
    return (*_in_turn(whole, counts.get("global_views", len(whole))), *_in_turn(kinds, number))


def _in_turn(views: Sequence[ViewConfig], count: int) -> Iterator[ViewConfig]:
    return islice(cycle(views), count)


def _views(views: tuple[ViewConfig, ...], name: str) -> tuple[ViewConfig, ...]:
    if name == "symmetric":
        return tuple(replace(view, **SYMMETRIC) for view in views)
    if name not in OMITTED:
        raise ConfigError(f"views is {name!r}; give one of {', '.join(VIEWS)}")
    return tuple(_without(view, omitted) for view, omitted in zip(views, cycle(OMITTED[name])))


def _without(view: ViewConfig, names: str) -> ViewConfig:
    never: dict[str, Any] = dict.fromkeys(names.split(), 0.0)
    return replace(view, **never)
