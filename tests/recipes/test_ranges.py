"""Laws of ranges: a value is checked wherever it comes from, a flag, RECIPE+setting=value, a preset or a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbyol.cli.train import main
from fastbyol.config import Config, CropRamp, to_json
from fastbyol.errors import ConfigError
from fastbyol.recipes import named
from fastbyol.recipes.overrides import COUNTS, settings
from fastbyol.recipes.settings import SETTINGS
from fastbyol.system.command_line import naming_memory

WHOLE = Config(
    replace(named("imagenet_rn50"), crop_ramp=CropRamp((128, 160))),
    data="t.beton",
    val="v.beton",
    epochs=100.0,
    knn_at=(0.5,),
    quality_at=(0.5,),
    device="cpu",
    loader="memory",
)
LENGTHS = ("budget_s", "deadline", "epochs")
INTEGERS = {"threads", "memory_side", "micro_batches", "recipe.views.local_px"}  # that are None there
NUMBERS = {"budget_s", "deadline", "checkpoint_s"}
CHANGES = [*COUNTS, *(name for name, each in settings(WHOLE.recipe).items() if each.kind in (int, float))]


def places(kind: type, more: set[str]) -> list[str]:
    """Name the places of all settings of a kind of number, or of lists of it."""

    def value_at(place: str) -> Any:
        value: Any = asdict(WHOLE)
        for name in place.split("."):
            value = value[0] if isinstance(value, tuple) else value
            value = value.get(name)
        return value[0] if isinstance(value, tuple) else value

    return [place for place in SETTINGS if place in more or (place != "budget" and type(value_at(place)) is kind)]


def with_number(place: str, value: float) -> str:
    """Return the settings of WHOLE with another number at a place, as JSON."""
    whole: dict[str, Any] = json.loads(to_json(WHOLE))
    *path, last = place.split(".")
    table: Any = whole
    for name in path:
        table = table[name][0] if isinstance(table[name], list) else table[name]
    table[last] = [value] * len(table[last]) if isinstance(table[last], list) else value
    others = {name: None for name in LENGTHS if place in LENGTHS and name != place}
    return json.dumps(whole | others)


def refused(text: str, folder: Path) -> str:
    """Return why a file of settings is refused."""
    (folder / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="give") as caught:
        Config.from_file(folder / "run.json")
    return str(caught.value)


def test_numbers_of_every_table_are_tried() -> None:
    found = {*places(int, INTEGERS), *places(float, NUMBERS)}
    assert {place.rpartition(".")[0] for place in found} == {place.rpartition(".")[0] for place in SETTINGS}
    assert {"deadline", "recipe.head.hidden", "recipe.views.sigma", "recipe.presets.base_lr"} <= found


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1e300, pytest.param(10**400, id="1e400")])
@pytest.mark.parametrize("place", [*places(int, INTEGERS), *places(float, NUMBERS)])
def test_no_setting_of_a_file_takes_an_absurd_number(place: str, value: float, tmp_path: Path) -> None:
    refused(with_number(place, value), tmp_path)


@pytest.mark.parametrize("place", [place for place in places(int, INTEGERS) if place != "seed"])
def test_nothing_that_is_counted_may_be_a_million_million(place: str, tmp_path: Path) -> None:
    refused(with_number(place, 10**12), tmp_path)


@pytest.mark.parametrize("name", CHANGES)
def test_no_change_of_a_recipe_takes_an_absurd_number(name: str) -> None:
    for value in ("nan", "1e300", "-1e300", "1" + 300 * "0"):
        with pytest.raises(ConfigError, match="give"):
            named(f"demo+beta=1+local_views=2+{name}={value}")


@pytest.mark.parametrize("side", [224, 4000])
def test_a_crop_ramp_ends_with_a_larger_view_than_it_has(side: int, tmp_path: Path) -> None:
    said = refused(with_number("recipe.crop_ramp.sizes_px", side), tmp_path)
    assert f"crop ramp has a side of {side} px, and views have 224 px in the end; give smaller ones" in said


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
@pytest.mark.parametrize("name", ["data", "val", "labelled", "init", "wandb", "recipe"])
def test_a_text_that_no_path_can_hold_is_refused(name: str, text: str, tmp_path: Path) -> None:
    whole = json.loads(to_json(WHOLE))
    if name == "recipe":
        whole["recipe"]["name"] = text
    else:
        whole[name] = text
    assert repr(text) in refused(json.dumps(whole), tmp_path)


@pytest.mark.parametrize(
    "flag", ["--epochs=1e308", "--threads=100000000", "--workers=100000000", "--checkpoint-every=" + 400 * "9" + "s"]
)
def test_a_flag_has_the_range_of_its_setting(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", f"--data={tmp_path / 'none.beton'}", f"--out={tmp_path / 'run'}", flag]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "; give a number " in said


def test_too_little_memory_is_one_clear_line() -> None:
    with (
        pytest.raises(ConfigError, match=r"too little memory for 1\.07e\+09 GiB at once; give a smaller network"),
        naming_memory(),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="too little memory; give a smaller"), naming_memory():
        torch.empty(2**31, 2**31, 2**31)
    with pytest.raises(ConfigError, match="too little memory; give a smaller"), naming_memory():
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), naming_memory():
        raise RuntimeError("another")
