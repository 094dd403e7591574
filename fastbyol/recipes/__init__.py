"""Know the recipes by name; constants stand beside their source ("P" the paper, "DM" the authors' released code)."""

from __future__ import annotations

from collections.abc import Callable

from fastbyol.config import ConfigError, Recipe
from fastbyol.recipes import contrastive, imagenet, small
from fastbyol.recipes.change import changed
from fastbyol.recipes.imagenet import PAPER_VIEWS

__all__ = ["PAPER_VIEWS", "RECIPES", "named"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        small.demo,
        small.cifar10_tiny,
        small.cifar10_rn18,
        small.cifar100_rn18,
        small.stl10_rn18,
        small.imagenette_rn18,
        small.imagenet100_rn18,
        imagenet.imagenet_rn50_e40,
        imagenet.imagenet_rn50,
        imagenet.imagenet_rn50_e300,
        imagenet.imagenet_rn50_e1000,
        imagenet.imagenet_rn50_b512_e1000,
        imagenet.imagenet_rn50x2_e1000,
        imagenet.imagenet_rn50x4_e1000,
        imagenet.imagenet_rn200x2_e1000,
        contrastive.simclr_cifar10_tiny,
        contrastive.simclr_cifar10_rn18,
        contrastive.simclr_imagenet_rn50_e300,
        contrastive.moco_cifar10_tiny,
        contrastive.moco_cifar10_rn18,
        contrastive.moco_imagenet_rn50_e300,
    )
}


def named(name: str) -> Recipe:
    """Build the recipe NAME, or NAME+setting=value+setting=value: that recipe with those settings changed.

    Raises ConfigError listing the names, or the settings, when there is none such.
    """
    base, plus, change = name.partition("+")
    if base not in RECIPES:
        raise ConfigError(f"no recipe {base!r}; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[base]()
    return changed(recipe, change) if plus else recipe
