"""Laws of configurations and recipes: they survive JSON, and refuse what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastbyol import schedule
from fastbyol.config import Config, HeadConfig, ObjectiveConfig, OptimConfig, ViewConfig, from_json, to_json
from fastbyol.errors import ConfigError
from fastbyol.model.resnet import ARCHS, ResNet
from fastbyol.recipe import scale_lr
from fastbyol.recipes import PAPER_VIEWS, RECIPES, named


def config(**changes: Any) -> Config:
    return Config(**{"recipe": named("demo"), "data": "train.beton", "epochs": 2.0, **changes})


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_and_end_at_zero_and_one(name: str) -> None:
    recipe = named(name)
    assert recipe.name == name
    if recipe.encoder.arch in ARCHS:  # those of timm: tests/peers
        with torch.device("meta"):
            assert ResNet(recipe.encoder).features > 0
    made = schedule.build(recipe, epochs=recipe.epochs)
    peak_lr = scale_lr(recipe.optim.base_lr, batch_size=recipe.batch_size)
    assert made.learning_rate(made.warmup) == pytest.approx(peak_lr)
    assert made.learning_rate(1.0) == 0
    assert made.tau(0.0) == pytest.approx(recipe.optim.tau_base)
    assert made.tau(1.0) == (1 if recipe.optim.tau_rises else recipe.optim.tau_base)


def test_imagenet_recipe_is_the_papers() -> None:
    recipe = named("imagenet_rn50")
    assert schedule.build(recipe, epochs=recipe.epochs).peak_lr == pytest.approx(0.45 * 4096 / 256)
    assert (recipe.head.hidden, recipe.head.out) == (4096, 256)
    assert (recipe.optim.momentum, recipe.optim.trust, recipe.optim.weight_decay) == (0.9, 1e-3, 1e-6)
    assert recipe.optim.tau_base == 0.99
    first, second = recipe.views
    assert (first.blur, second.blur, first.solarize, second.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert first.jitter == second.jitter == 0.8


def test_warmup_follows_the_length_of_the_run() -> None:
    recipe = named("imagenet_rn50")
    assert schedule.build(recipe, epochs=1000).warmup == 0.01
    assert schedule.build(recipe, epochs=20).warmup == 0.5
    assert schedule.build(recipe, epochs=20, warmup_max=0.25).warmup == 0.25


@pytest.mark.parametrize("device", ["cuda:0", "tpu", ""])
def test_a_device_of_no_known_name_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"device is .*; give one of cuda, cpu"):
        config(device=device)


def test_dalis_crops_are_of_one_size() -> None:
    assert config(recipe=named("demo+global_views=4"), crop="dali").crop == "dali"
    with pytest.raises(ConfigError, match="the 2 local views have their own; give --crop kernels"):
        config(recipe=named("demo+local_views=2"), crop="dali")


@pytest.mark.parametrize("name", RECIPES)
def test_configurations_survive_json(name: str) -> None:
    whole = config(recipe=named(name), epochs=None, budget_s=90.0, val="v.beton")
    assert from_json(to_json(whole)) == whole


def test_a_configuration_of_0_1_without_a_loss_is_byols() -> None:
    older = json.loads(to_json(config()))
    del older["recipe"]["objective"]["loss"]
    assert from_json(json.dumps(older)) == config()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": 3}', to_json(config()).replace('"seed"', '"sead"')])
def test_a_foreign_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a configuration"):
        from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": None},
        {"epochs": 1.0, "budget_s": 1.0},
        {"epochs": 0.0},
        {"epochs": None, "budget_s": -1.0},
        {"seed": -1},
        {"workers": 0},
        {"log_every": 0},
        {"checkpoint_s": 0.0},
        {"memory_side": 160},
        {"memory_side": 7, "loader": "memory"},
        {"recipe": replace(named("demo"), optim=OptimConfig(1.0, 0.0, 0.9, warmup_epochs=50))},
    ],
)
def test_an_impossible_run_is_refused_with_a_remedy(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        config(**changes)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ViewConfig(flip=1.5),
        lambda: ViewConfig(area=(0.0, 1.0)),
        lambda: ViewConfig(area=(0.5, 1.2)),
        lambda: ViewConfig(sigma=(2.0, 1.0)),
        lambda: ViewConfig(hue=-0.1),
        lambda: HeadConfig(hidden=0),
        lambda: HeadConfig(predictor_depth=-1),
        lambda: ObjectiveConfig(target="teacher"),
        lambda: ObjectiveConfig(normalization="l1"),
        lambda: ObjectiveConfig(beta=-1.0),
        lambda: ObjectiveConfig(temperature=0.0),
        lambda: ObjectiveConfig(queue=-1),
        lambda: ObjectiveConfig(beta=1.0, target="online", queue=8),
        lambda: ObjectiveConfig(fade=0.5),
        lambda: ObjectiveConfig(beta=1.0, fade=1.5),
        lambda: ObjectiveConfig(beta=1.0, beta_end=0.5),
        lambda: ObjectiveConfig(decoupled=True),
        lambda: ObjectiveConfig(beta=1.0, fade=0.5, loss="mine:Loss"),
        lambda: OptimConfig(1.0, 0.0, tau_base=1.1),
        lambda: OptimConfig(-1.0, 0.0, 0.9),
        lambda: replace(named("demo"), batch_size=1),
        lambda: replace(named("demo"), crop_px=4),
        lambda: replace(named("demo"), eval_margin=0.0),
    ],
)
def test_an_impossible_setting_is_refused_with_a_remedy(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"give|needs"):
        build()


def test_recipe_names_are_offered() -> None:
    with pytest.raises(ConfigError, match="imagenet_rn50"):
        named("imagenet_rn51")


def test_views_are_the_papers_but_for_cifars() -> None:
    assert {name for name in RECIPES if named(name).views != PAPER_VIEWS} == {n for n in RECIPES if "cifar" in n}


def test_a_configuration_written_before_there_were_objectives_is_still_read() -> None:
    whole = json.loads(to_json(config()))
    del whole["recipe"]["objective"], whole["recipe"]["optim"]["tau_rises"]
    del whole["recipe"]["optim"]["predictor_lr_scale"]
    del whole["recipe"]["head"]["projector_depth"], whole["recipe"]["head"]["predictor_depth"]
    assert from_json(json.dumps(whole)) == config()
