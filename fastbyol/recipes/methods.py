"""What --method auto may choose: changes of a recipe that won at a length of run, with the scores that say so."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from fastbyol.config import Recipe
from fastbyol.errors import ConfigError
from fastbyol.recipes import RECIPES
from fastbyol.recipes.overrides import apply_change, settings


@dataclass(frozen=True)
class Evidence:
    """Mean kNN top-1 of a method and of the recipe's own at equal compute, which was `epochs` of the recipe's own.

    Rows from a GPU compare equal epochs instead; there the method took less time, too.
    """

    epochs: float
    own: float
    chosen: float


@dataclass(frozen=True)
class Choice:
    """A method that won over a recipe's own, to be chosen up to `until` epochs of the latter: RECIPE+change.

    images: in an epoch of `until` and of the evidence. On other data the images seen count, whatever the epochs.
    evidence: by ascending epochs, from benchmarks/quality.py, or benchmarks/gpu/call.py, on images held out of the
    training set. docs/quality.md says why it may be chosen for longer runs than these, up to `until`.
    """

    name: str
    change: str
    until: float
    images: int
    evidence: tuple[Evidence, ...]

    def epochs_of(self, seen: float) -> float:
        """Return the epochs of the evidence's data in which so many images are seen."""
        return seen / self.images

    def nearest(self, seen: float) -> Evidence:
        """Return the evidence for the length most like that of a run that sees so many images."""
        return min(self.evidence, key=lambda each: abs(math.log(each.epochs / self.epochs_of(seen))))


NEGATIVES = "target=online+predictor_depth=0+beta=1"  # of the batch alone
SGD = "weight_decay=0.0005+optimizer=sgd+views=no_blur"
SIMCLR = f"{NEGATIVES}+base_lr=1+{SGD}"
# decoupled: without an image's other view among the negatives; larger batches cost less an image
MUON = f"{NEGATIVES}+views=no_blur+decoupled=true+batch_size=256+optimizer=muon"
# for a recipe without blur
UNBLURRED = f"{NEGATIVES}+optimizer=sgd+base_lr=1+weight_decay=0.0005+warmup_epochs=1+decoupled=true"
CIFAR = 47500  # images of CIFAR-10's training set, without those held out
CHOICES: dict[str, tuple[Choice, ...]] = {
    "cifar10_tiny": (
        Choice(
            "SimCLR by Muon",
            f"{MUON}+base_lr=0.1",
            until=10,
            images=CIFAR,
            evidence=(Evidence(1.13, 36.7, 55.0), Evidence(5.65, 44.6, 61.1)),
        ),
        Choice(
            "SimCLR by Muon", f"{MUON}+base_lr=0.04", until=35, images=CIFAR, evidence=(Evidence(22.6, 55.8, 65.8),)
        ),
        Choice(
            "SimCLR by SGD",
            f"{NEGATIVES}+base_lr=1.4+{SGD}+decoupled=true+batch_size=256",
            until=120,
            images=CIFAR,
            evidence=(Evidence(67.8, 63.6, 67.4),),
        ),
    ),
    "cifar10_rn18": (Choice("SimCLR", UNBLURRED, until=20, images=CIFAR, evidence=(Evidence(10, 37.6, 57.2),)),),
    "demo": (Choice("SimCLR", SIMCLR, until=100, images=4000, evidence=(Evidence(12.8, 78.5, 97.8),)),),
}


def choices(recipe: Recipe, *, flags: Collection[str] = ()) -> tuple[Choice, ...]:
    """Return what may be chosen for a recipe; raise ConfigError where the user has set what a choice would set.

    flags: settings of the recipe that the user gave beside its name, be it with the values that it has anyway.
    """
    name = recipe.name.partition("+")[0]
    found = CHOICES.get(name, ())
    if any(recipe.name.endswith(f"+{choice.change}") for choice in found):
        return ()  # chosen before: the recipe of a run's config.json
    if found:
        before, now = settings(RECIPES[name]()), settings(recipe)
        said = {*flags, *(assignment.partition("=")[0] for assignment in recipe.name.split("+")[1:])}
        for choice in found:
            named = [assignment.partition("=")[0] for assignment in choice.change.split("+")]
            named += ["weight_decay"] if "optimizer=muon" in choice.change else []  # which does not heed it
            changed = {each for each in named if each in now and now[each].value != before[each].value}
            given = [each for each in named if each in said | changed]
            if given:
                raise ConfigError(
                    f"--method auto may choose {choice.name} for {name}, which sets {', '.join(given)}, and so do you; "
                    "leave that out, or --method auto"
                )
            try:
                apply_change(recipe, choice.change)
            except ConfigError as error:
                raise ConfigError(
                    f"--method auto may choose {choice.name} for {name}, which does not go with its settings; leave "
                    f"out --method auto, or change them: {error}"
                ) from error
    return found


def choose(recipe: Recipe, *, seen: float) -> Choice | None:
    """Choose for a run in which the recipe's own method would see so many images; None keeps that.

    seen: images of the data times epochs. Raises ConfigError like choices.
    """
    return next((each for each in choices(recipe) if each.epochs_of(seen) <= each.until), None)


def variants(recipe: Recipe) -> list[Recipe]:
    """Return all that auto may make of a recipe, itself last."""
    return [*(apply_change(recipe, choice.change) for choice in choices(recipe)), recipe]
