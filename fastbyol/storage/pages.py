"""HTML pages from templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render(
    template: Path, values: Mapping[str, Any], *, filters: Mapping[str, Callable[..., str]] | None = None
) -> str:
    """Return the page of a Jinja template with these values, escaped; it may include files of its folder.

    A name that it uses and that is not given raises jinja2.UndefinedError.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415 - costs a start of training time

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template.name).render(values)
