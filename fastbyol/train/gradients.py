"""Check that the loss reaches every parameter, before a run begins."""

from __future__ import annotations

import copy

import torch

from fastbyol.config import Recipe
from fastbyol.errors import require
from fastbyol.model.parts import OURS
from fastbyol.registry import ENCODERS, OBJECTIVES
from fastbyol.train.step import Eager, random_views
from fastbyol.weights.match import listed

IMAGES = 2  # the fewest that batch norm takes
ENCODER, PACKAGE = "online.encoder.", "fastbyol."


def check_gradients(engine: Eager, recipe: Recipe, *, ranks: int) -> None:
    """Raise ConfigError that names parameters without a gradient, where the optimiser or several ranks need them all.

    A copy of the model computes the loss of random views once; not for encoders and losses of ours, which use all.
    """
    has_our_loss = OBJECTIVES.get(recipe.objective.loss, "").startswith(PACKAGE)
    is_ours = has_our_loss and ENCODERS.get(recipe.encoder.arch) == OURS
    if is_ours or not (ranks > 1 or getattr(engine.optimizer, "needs_gradients", False)):
        return
    unused = _without_gradient(engine, recipe)
    inside = [name.removeprefix(ENCODER) for name in unused if name.startswith(ENCODER)]
    require(
        not inside,
        f"encoder {recipe.encoder.arch} does not use {listed(inside)} in its forward, so there is no gradient to learn "
        f"by; leave that out of the network, or keep it as drawn by +frozen={inside[0] if inside else ''} after the "
        "recipe's name, in quotes where there are more names, with spaces between",
    )
    require(not unused, f"loss {recipe.objective.loss} does not use {listed(unused)}; leave that out of its module")


def _without_gradient(engine: Eager, recipe: Recipe) -> list[str]:
    """Name the trainable parameters that get no gradient; model and random generators stay as they are."""
    weight = next(engine.model.parameters())
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        model = copy.deepcopy(engine.model)
        with engine.autocast():
            loss = model(*random_views(recipe, images=IMAGES, device=weight.device)).loss
        loss.backward()
    return [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
