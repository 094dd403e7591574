"""Laws of settings as a file: nothing is lost on the way, everything is documented, and a wrong word is named."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.budget import SLURM_MARGIN_S
from fastbyol.cli.settings import format_settings
from fastbyol.cli.train import build_parser, check_texts, main
from fastbyol.cli.train_run import config_of
from fastbyol.config import GONE, PRECISIONS, Config, CropRamp, EncoderConfig, Preset, Recipe, from_json, to_json
from fastbyol.errors import ConfigError
from fastbyol.recipe import LOSS_SETTINGS, WITHOUT_TARGET, HeadConfig, ObjectiveConfig, OptimConfig, ViewConfig
from fastbyol.recipes import RECIPES, named
from fastbyol.recipes.config_file import formatted, read
from fastbyol.recipes.settings import SETTINGS
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.device import default_precision

SHORT = 'data = "d.beton"\nrecipe = "cifar10_tiny"\n'
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {  # of a table: its class, and what that needs
    "recipe.encoder": (EncoderConfig, {}),
    "recipe.head": (HeadConfig, {}),
    "recipe.views": (ViewConfig, {}),
    "recipe.optim": (OptimConfig, {"base_lr": 1.0, "weight_decay": 0.0, "tau_base": 0.9}),
    "recipe.objective": (ObjectiveConfig, {"beta": 1.0}),
    "recipe.presets": (Preset, {"epochs": 1.0, "base_lr": 1.0, "tau_base": 0.9}),
}


OF_A_LOSS = {
    name: {"loss": loss, "target": "online", "beta": 0.0} for loss in WITHOUT_TARGET for name in LOSS_SETTINGS[loss]
}
CLASSES = [Recipe, CropRamp, *(kind for kind, _ in KINDS.values())]


def written(tmp_path: Path, text: str, name: str = "run.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def whole(recipe: str = "demo") -> Config:
    return Config(recipe, data="t.beton", val="v.beton", budget_s=90.5, seed=7, knn_at=(0.25, 0.5), wandb='a "b"\\\t')


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize("recipe", [*RECIPES, "cifar10_tiny+batch_size=32"])
def test_settings_survive_a_file(recipe: str, suffix: str, tmp_path: Path) -> None:
    config = whole(recipe)
    config = replace(config, recipe=replace(config.recipe, crop_ramp=CropRamp((16, 20))))
    path = tmp_path / f"run.{suffix}"
    path.write_text(formatted(path, {name: getattr(config, name) for name in vars(config)}))
    assert Config.from_file(path) == config


@given(text=st.text(st.characters(exclude_categories=["Cs"])), number=st.floats(0, 1e30))
def test_any_text_and_number_survives_toml(text: str, number: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "run.toml"
    optim = replace(named("demo").optim, weight_decay=number)
    recipe = replace(named("demo"), optim=optim)
    path.write_text(formatted(path, {"recipe": recipe, "data": text}), encoding="utf-8")
    assert read(path) == {"recipe": recipe, "data": text}


def test_the_configuration_of_any_run_is_taken(tmp_path: Path) -> None:
    written(tmp_path, to_json(whole()), "config.json")
    assert Config.from_file(tmp_path) == Config.from_file(tmp_path / "config.json") == whole()


def test_an_optimiser_beside_the_recipe_is_that_of_the_recipe(tmp_path: Path) -> None:
    settings = json.loads(to_json(whole()))
    del settings["recipe"]["optim"]["optimizer"]
    text = json.dumps({**settings, "optimizer": "sgd"})  # as version 0.1 wrote it
    written(tmp_path, text, "config.json")
    recipe = whole().recipe
    wanted = replace(whole(), recipe=replace(recipe, optim=replace(recipe.optim, optimizer="sgd")))
    assert from_json(text) == Config.from_file(tmp_path) == wanted


def test_a_setting_that_is_gone_is_taken_where_it_changed_nothing(tmp_path: Path) -> None:
    settings = json.loads(to_json(whole()))
    for name, value in GONE.items():
        text = json.dumps({**settings, "recipe": {**settings["recipe"], name: value}})
        written(tmp_path, text, "config.json")
        assert from_json(text) == Config.from_file(tmp_path) == whole()
        text = json.dumps({**settings, "recipe": {**settings["recipe"], name: not value}})
        with pytest.raises(ConfigError, match=f"no setting is named recipe.{name}"):
            from_json(text)


def test_a_file_may_name_a_recipe_and_change_it(tmp_path: Path) -> None:
    text = """
    data = "d.beton"
    budget = "5m"
    [recipe]
    base = "imagenet_rn50"
    batch_size = 512
    [recipe.optim]
    base_lr = 0.1
    [recipe.views]
    blur = 0.25
    [recipe.crop_ramp]
    sizes_px = [128]
    """
    config, base = Config.from_file(written(tmp_path, text)), named("imagenet_rn50")
    assert (config.budget_s, config.epochs) == (300.0, None)
    assert config.recipe.optim == replace(base.optim, base_lr=0.1)
    assert {preset.base_lr for preset in config.recipe.presets} == {0.1}
    assert [view.blur for view in config.recipe.views] == [0.25, 0.25]
    assert config.recipe.views[1].solarize == 0.2
    assert (config.recipe.crop_ramp, config.recipe.batch_size) == (CropRamp((128,)), 512)


def test_views_are_changed_one_by_one_too(tmp_path: Path) -> None:
    text = '[recipe]\nbase = "demo"\n[[recipe.views]]\narea = [0.5, 1]\n[[recipe.views]]\nhue = 0\n'
    first, second = read(written(tmp_path, text))["recipe"].views
    assert (first.area, first.hue, second.area, second.hue) == ((0.5, 1), 0.1, (0.08, 1.0), 0)


def test_a_list_of_more_views_changes_the_recipes_in_turn(tmp_path: Path) -> None:
    text = '[recipe]\nbase = "demo"\n' + "".join(f"[[recipe.views]]\nhue = 0.{number}\n" for number in (1, 2, 3))
    found = read(written(tmp_path, text))["recipe"].views
    assert [view.hue for view in found] == [0.1, 0.2, 0.3]
    assert [view.solarize for view in found] == [0.0, 0.2, 0.0]


def test_more_views_of_a_recipe_survive_a_file(tmp_path: Path) -> None:
    recipe = named("demo+global_views=3+local_views=2+local_predictor=true")
    path = tmp_path / "run.toml"
    path.write_text(formatted(path, {"recipe": recipe}))
    assert read(path)["recipe"] == recipe


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        (("", "local_px = 8", ""), "a local view comes before a global one"),
        (("", "", "local_px = 8", "local_px = 16"), r"local views have sides of \[8, 16\] px; give one local_px"),
        (("", "local_px = 8"), "has 1 views that are not local"),
    ],
)
def test_local_views_come_last_and_are_of_one_size(tmp_path: Path, sides: tuple[str, ...], said: str) -> None:
    text = '[recipe]\nbase = "demo"\n' + "".join(f"[[recipe.views]]\n{side}\n" for side in sides)
    with pytest.raises(ConfigError, match=said):
        read(written(tmp_path, text))


def test_a_file_without_a_length_has_the_recipes(tmp_path: Path) -> None:
    path = written(tmp_path, SHORT)
    assert Config.from_file(path).epochs == named("cifar10_tiny").epochs
    assert Config.from_file(path, {"budget_s": 9.0, "seed": 3}) == Config(
        "cifar10_tiny", data="d.beton", budget_s=9.0, seed=3
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sead = 1", "no setting is named sead; the nearest is seed"),
        (
            '[recipe]\nbase = "demo"\n[recipe.optim]\nbase_rl = 1',
            "recipe.optim.base_rl; the nearest is recipe.optim.base_lr",
        ),
        ('[recipe]\nbase = "demo"\n[[recipe.views]]\nblurr = 1\n[[recipe.views]]', "the nearest is recipe.views.blur"),
        ('[recipe]\nbase = "demo"\n[recipe.views]\narea = [0.1]', "recipe.views.area has 1 entries; give 2"),
        ('[recipe]\nbase = "demo"\nviews = 3', "recipe.views is 3; give a table"),
        ('[recipe]\nbase = "dema"', "no recipe is named 'dema'"),
        ('[recipe]\nname = "mine"', "setting recipe.encoder is missing; give it a value"),
        ('[recipe]\nbase = "demo"\nbatch_size = 1', "batch size is 1"),
        ('[recipe]\nbase = "demo"\nbatch_size = "64"', "recipe.batch_size is '64'; give a whole number"),
        ("recipe = 3", "recipe is 3; give the name of a recipe"),
        ("epochs = true", "epochs is True; give a number"),
        ("seed = 1.5", "seed is 1.5; give a whole number"),
        ("budget = 8", "budget is 8; give a text"),
        ('budget = "8"', "'8' is not a duration"),
        ('budget = "until noon"', "'noon' is not a date"),
        ('budget = "8h"\nbudget_s = 60.0', "budget and budget_s each say how long the run is; give one of them"),
        ('budget = "8h"\ndeadline = 5e9', "budget and deadline each say how long the run is"),
        ('budget = "slurm"\nepochs = 9', "budget and epochs each say how long the run is"),
        ("budget_s = 60.0\nepochs = 9", "budget_s and epochs each say how long the run is"),
        ("seed = ", "Invalid value"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read(written(tmp_path, text))
    assert said in str(raised.value)
    assert str(tmp_path / "run.toml") in str(raised.value)


def test_flags_rule_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path, f"{SHORT}epochs = 9\nlog_every = 3\nprofile = true\n"), tmp_path / "b.toml"
    asked = ["--seed=5", "--budget=90s", "--batch-size=32", "--no-tensorboard", "--device=cpu"]
    assert main(["--config", str(path), *asked, "--save-config", str(out)]) == 0
    assert f"fastbyol-train --config {out}" in capsys.readouterr().out
    config = Config.from_file(out)
    assert (config.seed, config.budget_s, config.epochs, config.log_every) == (5, 90.0, None, 3)
    assert (config.profile, config.tensorboard, config.recipe.batch_size) == (True, False, 32)
    assert main(["--config", str(path), "--save-config", str(out)]) == 2
    assert main(["demo", "--config", str(path)]) == 2
    assert "recipe demo is given, and" in capsys.readouterr().err


def test_slurm_is_asked_when_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    path, out = written(tmp_path, f'{SHORT}budget = "slurm"\n'), tmp_path / "b.toml"
    folder = RunFolder(tmp_path / "run")
    assert main(["--config", str(path), "--settings"]) == 0  # outside of a job
    assert main(["--config", str(path), "--plan", "80"]) == 0
    assert main(["--config", str(path), "--save-config", str(out)]) == 0
    assert main(["demo", "--budget=slurm", "--save-config", str(tmp_path / "c.toml")]) == 0
    assert read(out)["budget"] == read(tmp_path / "c.toml")["budget"] == "slurm"
    assert Config.from_file(out, {"epochs": 40.0}).epochs == 40
    assert Config.from_file(out, {"budget": "90s"}).budget_s == 90
    with pytest.raises(ConfigError, match="budget and epochs each"):
        Config.from_file(out, {"budget": "90s", "epochs": 40.0})
    args = build_parser().parse_args(["--config", str(out), "--device=cpu"])
    check_texts(args)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for end in ("5000000000", "6000000000"):  # of a job and of the one that took its place
        monkeypatch.setenv("SLURM_JOB_END_TIME", end)
        assert config_of(args, folder).deadline == Config.from_file(out).deadline == float(end) - SLURM_MARGIN_S
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(ConfigError, match="outside a Slurm job"):
        config_of(args, folder)
    capsys.readouterr()


def test_what_the_machine_chose_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "b.toml"
    assert main(["demo", "--save-config", str(out)]) == 0
    assert not read(out).keys() & {"device", "engine", "precision", "workers", "data"}
    out = tmp_path / "c.json"
    assert main(["demo", "--device=cpu", "--save-config", str(out)]) == 0
    assert json.loads(out.read_text())["device"] == "cpu"


def test_python_takes_a_recipes_name_and_what_the_machine_has() -> None:
    config = Config("cifar10_tiny", data="d.beton", epochs=5.0)
    assert config.recipe == named("cifar10_tiny")
    assert (config.device, config.engine, config.precision) in {
        ("cpu", "eager", default_precision("cpu")),
        ("cuda", "graph", "bfloat16"),
    }
    assert config.workers >= 1
    with pytest.raises(ConfigError, match="no recipe is named 'cifar10_tyni'"):
        Config("cifar10_tyni", data="d.beton", epochs=5.0)
    with pytest.raises(ConfigError, match="recipe is 3; give a Recipe"):
        Config(3, data="d.beton", epochs=5.0)  # type: ignore[arg-type]


def test_a_resumed_run_keeps_its_precision_unless_another_is_given(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def precision_of(*more: str) -> str:
        args = build_parser().parse_args(["demo", "--data=t.beton", "--epochs=12", "--device=cpu", *more])
        check_texts(args)
        return config_of(args, folder).precision

    assert precision_of("--resume") == default_precision("cpu")  # there is no run yet
    for precision in PRECISIONS:
        folder.config.write_text(to_json(replace(whole(), precision=precision)))
        assert precision_of("--resume") == precision
        assert precision_of() == default_precision("cpu")
        assert [precision_of("--resume", f"--precision={given}") for given in PRECISIONS] == [*PRECISIONS]


def places(kind: Any, path: str) -> set[str]:
    """Name every setting of a class and of the classes within it."""
    found = set()
    for name, hint in get_type_hints(kind).items():
        inner = next((each for each in CLASSES if re.search(rf"\b{each.__name__}\b", str(hint))), None)
        found |= {f"{path}{name}"} if inner is None else places(inner, f"{path}{name}.")
    return found


def test_every_setting_is_documented() -> None:
    assert places(Config, "") | {"budget"} == SETTINGS.keys()


@pytest.mark.parametrize("place", [place for place in SETTINGS if place.rpartition(".")[0] in KINDS])
def test_a_documented_range_is_the_one_that_holds(place: str) -> None:
    path, _, name = place.rpartition(".")
    kind, needed = KINDS[path]
    needed = needed | OF_A_LOSS.get(name, {})
    usual = getattr(kind(**needed), name)

    def is_taken(value: float) -> bool:
        try:
            kind(**{**needed, name: (value, value) if isinstance(usual, tuple) else value})
        except ConfigError:
            return False
        return True

    words, step = SETTINGS[place].values, 1 if isinstance(usual, int) and name != "width" else 1e-9
    if bounds := re.fullmatch(r"(\d+) to (\d+)(, without \2)?", words):
        low, high = int(bounds[1]), int(bounds[2])
        assert [is_taken(value) for value in (low - step, low, high, high + step)] == [
            False,
            True,
            not bounds[3],
            False,
        ]
    elif choice := re.fullmatch(r"(\d+) or (\d+)", words):
        assert [value for value in range(9) if is_taken(value)] == [int(number) for number in choice.groups()]
    elif bounds := re.fullmatch(r"(\d+) or more", words):
        assert [is_taken(value) for value in (int(bounds[1]) - step, int(bounds[1]))] == [False, True]
    elif words.startswith("above 0"):
        assert [is_taken(value) for value in (0, 0.5)] == [False, True]
        assert is_taken(1 + step) != words.endswith("to 1")
    else:
        assert isinstance(usual, str | bool)


def test_the_list_of_settings_shows_a_recipes_values() -> None:
    said = format_settings(named("cifar10_tiny"))
    assert "area = [0.2, 1]" in said
    assert said.count("[[recipe.views]]") == 2
    assert all(place.rpartition(".")[2] in format_settings(None) for place in SETTINGS)
    assert str(asdict(named("cifar10_tiny"))["optim"]["base_lr"]).rstrip("0.") in said


def test_the_file_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    config = Config.from_file(written(tmp_path, page.partition("```toml\n")[2].partition("```")[0]))
    assert (config.budget_s, config.recipe.batch_size, config.recipe.optim.base_lr) == (8 * 3600, 1024, 0.3)
    assert {view.hue for view in config.recipe.views} == {0.05}


def test_a_wrong_type_beside_a_base_is_named(tmp_path: Path) -> None:
    text = 'data = "d.beton"\n[recipe]\nbase = "imagenet_rn50"\n[recipe.optim]\nbase_lr = "0.2"\n'
    written(tmp_path, text)
    with pytest.raises(ConfigError, match=r"recipe\.optim\.base_lr"):
        Config.from_file(tmp_path / "run.toml")
