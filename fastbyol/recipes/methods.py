"""What --method auto may choose: changes of a recipe that won at a length of run, with the scores that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastbyol.config import Recipe
from fastbyol.errors import ConfigError
from fastbyol.recipes import RECIPES
from fastbyol.recipes.overrides import apply_change, settings


@dataclass(frozen=True)
class Evidence:
    """Mean kNN top-1 of a method and of the recipe's own at equal compute, which was `epochs` of the recipe's own."""

    epochs: float
    own: float
    chosen: float


@dataclass(frozen=True)
class Choice:
    """A method that won over a recipe's own, to be chosen up to `until` epochs of the latter: RECIPE+change.

    until: at most twice the longest length at which it has won. evidence: by ascending epochs, from
    benchmarks/quality.py on images held out of the training set, and in docs/quality.md.
    """

    name: str
    change: str
    until: float
    evidence: tuple[Evidence, ...]

    def nearest(self, epochs: float) -> Evidence:
        """Return the evidence for the length most like this one."""
        return min(self.evidence, key=lambda each: abs(math.log(each.epochs / epochs)))


SIMCLR = (  # negatives of the batch alone, SGD at the rate of a cosine loss, and views without blur
    "target=online+predictor_depth=0+beta=1+base_lr=1+weight_decay=0.0005+optimizer=sgd+views=no_blur"
)
CHOICES: dict[str, tuple[Choice, ...]] = {
    "cifar10_tiny": (
        Choice("SimCLR", SIMCLR, until=16, evidence=(Evidence(0.805, 34.7, 48.5), Evidence(4.03, 40.8, 55.0))),
    ),
    "demo": (Choice("SimCLR", SIMCLR, until=20, evidence=(Evidence(9.73, 74.3, 97.0),)),),
}


def choices(recipe: Recipe) -> tuple[Choice, ...]:
    """Return what may be chosen for a recipe; raise ConfigError where the user has set what a choice would set."""
    name = recipe.name.partition("+")[0]
    found = CHOICES.get(name, ())
    if found:
        before, now = settings(RECIPES[name]()), settings(recipe)
        for choice in found:
            named = [assignment.partition("=")[0] for assignment in choice.change.split("+")]
            given = [each for each in named if each in now and now[each].value != before[each].value]
            if given:
                raise ConfigError(
                    f"--method auto may choose {choice.name} for {name}, which sets {', '.join(given)}, and so do you; "
                    "leave that out, or --method auto"
                )
    return found


def choose(recipe: Recipe, *, epochs: float) -> Choice | None:
    """Choose for a run that fits this many epochs of the recipe's own method; None keeps that. Raises like choices."""
    return next((choice for choice in choices(recipe) if epochs <= choice.until), None)


def variants(recipe: Recipe) -> list[Recipe]:
    """Return all that auto may make of a recipe, itself last."""
    return [*(apply_change(recipe, choice.change) for choice in choices(recipe)), recipe]
