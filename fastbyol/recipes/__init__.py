"""The recipes by name; each constant has its source: "P" is the paper, "DM" the authors' released code."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fastbyol.config import Recipe
from fastbyol.errors import ConfigError
from fastbyol.recipes import contrastive, imagenet, small, timm_networks
from fastbyol.recipes.imagenet import PAPER_VIEWS
from fastbyol.recipes.overrides import apply_change

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
        timm_networks.imagenette_vit_small,
        timm_networks.imagenette_convnext_tiny,
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
    """Build the recipe NAME, or NAME+setting=value+setting=value, which changes settings of it.

    Raises ConfigError with similar names, or the known settings, if one is unknown.
    """
    base, plus, change = name.partition("+")
    if base not in RECIPES:
        alike = ", ".join(difflib.get_close_matches(base, RECIPES, n=3, cutoff=0.5)) or "demo"
        raise ConfigError(f"no recipe is named {base!r}; give one that fastbyol-train --recipes lists, such as {alike}")
    recipe = RECIPES[base]()
    return apply_change(recipe, change) if plus else recipe
