"""Laws of choosing a loader by its name: what cannot be used is refused before anything is decoded."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from fastbyol import loaders
from fastbyol.beton import Reader
from fastbyol.config import ConfigError
from tests.conftest import Betons


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nativ", {}, "no loader 'nativ'; choose one of native, memory, ffcv, dali"),
        ("native", {"workers": 0}, "workers is 0; give at least 1"),
        ("native", {"ahead": 0}, "ahead is 0; give at least 1"),
        ("memory", {"processes": 0}, "processes is 0; give at least 1"),
        ("native", {"on_error": "ignore"}, "on_error is 'ignore'; choose one of fail, skip"),
    ],
)
def test_what_is_no_setting_is_refused(betons: Betons, name: str, settings: dict[str, Any], message: str) -> None:
    with Reader(betons.train) as reader, pytest.raises(ConfigError, match=message):
        loaders.load(name, reader, [], **({"workers": 1} | settings))


@pytest.mark.parametrize(("name", "package"), [("ffcv", "ffcv"), ("dali", "nvidia")])
def test_a_missing_package_is_named_with_how_to_install_it(betons: Betons, name: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with Reader(betons.train) as reader, pytest.raises(ConfigError, match=rf"pip install 'fastbyol\[{name}\]'"):
        loaders.load(name, reader, [], workers=1)
