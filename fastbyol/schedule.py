"""Learning-rate, EMA, crop and beta schedules as pure functions of progress in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastbyol.recipe import CropRamp, ObjectiveConfig, Recipe, scale_lr


def _cosine_decay(progress: float) -> float:
    return (math.cos(math.pi * progress) + 1) / 2


def learning_rate(progress: float, *, peak: float, warmup: float) -> float:
    """Return the learning rate: linear from 0 to `peak` over the share `warmup` of the run, cosine to exactly 0."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * _cosine_decay((progress - warmup) / (1 - warmup))


def ema_rate(progress: float, *, base: float, rises: bool = True) -> float:
    """Return tau: 1 - (1 - base)(cos(pi * progress) + 1) / 2, from `base` to exactly 1; or `base` throughout.

    Source: paper, section 3.2. Table 5a has a run whose tau stays 0, hence `rises`.
    """
    if not rises:
        return base
    return 1 - (1 - base) * _cosine_decay(progress)


def beta(progress: float, *, objective: ObjectiveConfig) -> float:
    """Return the weight of the negatives: from `beta` to `beta_end` by a half cosine over the share `fade`."""
    if not objective.fade:
        return objective.beta
    left = _cosine_decay(min(progress / objective.fade, 1.0))
    return objective.beta_end + (objective.beta - objective.beta_end) * left


def crop_px(progress: float, *, full_px: int, ramp: CropRamp | None) -> int:
    """Return the side of a training view in pixels: one of the ramp's sizes up to `ramp.until`, then `full_px`."""
    if ramp is None or progress >= ramp.until:
        return full_px
    return ramp.sizes_px[int(progress / ramp.until * len(ramp.sizes_px))]


def peaks(recipe: Recipe, *, epochs: float) -> tuple[float, float]:
    """Return the base learning rate and base tau for a run of that many epochs.

    Between the recipe's presets both are interpolated over log(epochs), tau as log(1 - tau); outside them the nearest
    preset applies. A recipe without presets uses its own rates.
    """
    presets = sorted(recipe.presets, key=lambda preset: preset.epochs)
    if not presets:
        return recipe.optim.base_lr, recipe.optim.tau_base
    shorter = [preset for preset in presets if preset.epochs <= epochs] or presets[:1]
    longer = [preset for preset in presets if preset.epochs > epochs] or presets[-1:]
    below, above = shorter[-1], longer[0]
    span = math.log(above.epochs / below.epochs)
    weight = min(max(math.log(epochs / below.epochs) / span, 0.0), 1.0) if span > 0 else 0.0
    base_lr = below.base_lr + weight * (above.base_lr - below.base_lr)
    remainder = (1 - below.tau_base) ** (1 - weight) * (1 - above.tau_base) ** weight
    return base_lr, 1 - remainder


@dataclass(frozen=True)
class Rejoin:
    """The second warm-up of a run made longer: from rate `lr` at progress `at` to the schedule's, over share `span`."""

    at: float
    lr: float
    span: float

    def learning_rate(self, progress: float, scheduled: float) -> float:
        """Return the rate at a progress for which the schedule has the rate `scheduled`."""
        if not self.at <= progress < self.at + self.span:
            return scheduled
        return self.lr + (scheduled - self.lr) * (progress - self.at) / self.span


@dataclass(frozen=True)
class Schedule:
    """The schedules of one run; `epochs` is the length they were built for, `warmup` a share of the run.

    rejoin: the second warm-up of a run that was made longer.
    """

    epochs: float
    base_lr: float
    tau_base: float
    peak_lr: float
    warmup: float
    full_px: int
    ramp: CropRamp | None
    objective: ObjectiveConfig
    tau_rises: bool = True
    rejoin: Rejoin | None = None

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate at a progress in [0, 1]."""
        rate = learning_rate(progress, peak=self.peak_lr, warmup=self.warmup)
        return rate if self.rejoin is None else self.rejoin.learning_rate(progress, rate)

    def tau(self, progress: float) -> float:
        """Return the EMA rate of the target at a progress in [0, 1]."""
        return ema_rate(progress, base=self.tau_base, rises=self.tau_rises)

    def beta(self, progress: float) -> float:
        """Return the weight of the negatives at a progress in [0, 1]."""
        return beta(progress, objective=self.objective)

    def crop_px(self, progress: float) -> int:
        """Return the side of a training view, in pixels, at a progress in [0, 1]."""
        return crop_px(progress, full_px=self.full_px, ramp=self.ramp)


def build(recipe: Recipe, *, epochs: float, warmup_max: float = 1.0) -> Schedule:
    """Build the schedules of a run of that many epochs; `warmup_max` limits the warm-up's share of the run."""
    base_lr, tau_base = peaks(recipe, epochs=epochs)
    return Schedule(
        epochs=epochs,
        base_lr=base_lr,
        tau_base=tau_base,
        peak_lr=scale_lr(base_lr, batch_size=recipe.batch_size),
        warmup=min(recipe.optim.warmup_epochs / epochs, warmup_max),
        full_px=recipe.crop_px,
        ramp=recipe.crop_ramp,
        tau_rises=recipe.optim.tau_rises,
        objective=recipe.objective,
    )


def _pixels(recipe: Recipe, crop_px: int) -> int:
    """Count the pixels of an image's views."""
    return sum(count * px**2 for count, px in recipe.sizes_of_views(crop_px))


def relative_cost(recipe: Recipe) -> float:
    """Return the mean cost of a step over the run relative to one at full crop size, in (0, 1]; cost is as pixels."""
    if recipe.crop_ramp is None:
        return 1.0
    full = _pixels(recipe, recipe.crop_px)
    early = [_pixels(recipe, px) / full for px in recipe.crop_ramp.sizes_px]
    return recipe.crop_ramp.until * sum(early) / len(early) + 1 - recipe.crop_ramp.until
