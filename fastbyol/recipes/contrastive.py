"""Recipes for contrastive methods, SimCLR and MoCo, in the paper's form of the loss."""

from __future__ import annotations

from dataclasses import replace

from fastbyol.config import ObjectiveConfig, Recipe
from fastbyol.recipes.imagenet import imagenet_rn50_e300
from fastbyol.recipes.purpose import CPU, MANY_GPUS, ONE_GPU, meant_for
from fastbyol.recipes.small import cifar10_rn18, cifar10_tiny


def simclr(base: Recipe) -> Recipe:
    """Turn a BYOL recipe into SimCLR: no predictor, no target, temperature 0.1 (P section 5, appendix F.5).

    Projector, views and optimiser stay BYOL's. The loss is 4 * temperature times SimCLR's: P's factor is
    2 * temperature, and both directions are summed.
    """
    return replace(
        base,
        name=f"simclr_{base.name}",
        head=replace(base.head, predictor_depth=0),
        objective=ObjectiveConfig(target="online", beta=1.0, temperature=0.1),
    )


def moco(base: Recipe, *, queue: int, tau: float, temperature: float) -> Recipe:
    """Turn a BYOL recipe into MoCo: no predictor, an EMA target at constant tau, a queue of negatives.

    The objective is MoCo's in both directions. Projector, views and optimiser stay BYOL's; He et al. use SGD.
    """
    return replace(
        base,
        name=f"moco_{base.name}",
        head=replace(base.head, predictor_depth=0),
        optim=replace(base.optim, tau_base=tau, tau_rises=False),
        presets=(),
        objective=ObjectiveConfig(target="ema", beta=1.0, temperature=temperature, queue=queue),
    )


@meant_for("ImageNet", MANY_GPUS)
def simclr_imagenet_rn50_e300() -> Recipe:
    """Build SimCLR on ImageNet, 300 epochs: P table 5b; 69.4 linear top-1."""
    return simclr(imagenet_rn50_e300())


@meant_for("CIFAR-10", ONE_GPU)
def simclr_cifar10_rn18() -> Recipe:
    """Build SimCLR on CIFAR-10."""
    return simclr(cifar10_rn18())


@meant_for("CIFAR-10", CPU)
def simclr_cifar10_tiny() -> Recipe:
    """Build SimCLR on CIFAR-10 for two CPU cores."""
    return simclr(cifar10_tiny())


@meant_for("ImageNet", MANY_GPUS)
def moco_imagenet_rn50_e300() -> Recipe:
    """Build MoCo on ImageNet: queue and tau of He et al. 2020, temperature of MoCo v2."""
    return moco(imagenet_rn50_e300(), queue=65_536, tau=0.999, temperature=0.2)


@meant_for("CIFAR-10", ONE_GPU)
def moco_cifar10_rn18() -> Recipe:
    """Build MoCo on CIFAR-10: constants of its authors' CIFAR-10 notebook."""
    return moco(cifar10_rn18(), queue=4096, tau=0.99, temperature=0.1)


@meant_for("CIFAR-10", CPU)
def moco_cifar10_tiny() -> Recipe:
    """Build MoCo on CIFAR-10 for two CPU cores."""
    return moco(cifar10_tiny(), queue=4096, tau=0.99, temperature=0.1)
