"""Know the schedules: pure functions from progress in [0, 1] to a learning rate, a target rate and a crop size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastbyol.config import CropRamp, Recipe


def _falling_cosine(progress: float) -> float:
    return (math.cos(math.pi * progress) + 1) / 2


def learning_rate(progress: float, *, peak: float, warmup: float) -> float:
    """Rise linearly from 0 to `peak` over the share `warmup` of the run, then fall on a cosine to exactly 0."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * _falling_cosine((progress - warmup) / (1 - warmup))


def ema_rate(progress: float, *, base: float, rises: bool = True) -> float:
    """Raise tau from `base` to exactly 1: 1 - (1 - base)(cos(pi * progress) + 1) / 2; or keep it at `base`.

    Source: paper, section 3.2; table 5a, whose tau of 0 is kept.
    """
    if not rises:
        return base
    return 1 - (1 - base) * _falling_cosine(progress)


def crop_px(progress: float, *, full_px: int, ramp: CropRamp | None) -> int:
    """Give the side of a training view: the ramp's sizes for equal shares of the run up to `until`, then `full_px`."""
    if ramp is None or progress >= ramp.until:
        return full_px
    return ramp.sizes_px[int(progress / ramp.until * len(ramp.sizes_px))]


def peaks(recipe: Recipe, *, epochs: float) -> tuple[float, float]:
    """Give base learning rate and base tau for a run of that many epochs.

    Between the recipe's presets both are interpolated over log(epochs), tau as log(1 - tau); outside them the nearest
    preset holds. A recipe without presets keeps its own.
    """
    known = sorted(recipe.presets, key=lambda preset: preset.epochs)
    if not known:
        return recipe.optim.base_lr, recipe.optim.tau_base
    shorter = [preset for preset in known if preset.epochs <= epochs] or known[:1]
    longer = [preset for preset in known if preset.epochs > epochs] or known[-1:]
    below, above = shorter[-1], longer[0]
    span = math.log(above.epochs / below.epochs)
    share = min(max(math.log(epochs / below.epochs) / span, 0.0), 1.0) if span > 0 else 0.0
    base_lr = below.base_lr + share * (above.base_lr - below.base_lr)
    remainder = (1 - below.tau_base) ** (1 - share) * (1 - above.tau_base) ** share
    return base_lr, 1 - remainder


@dataclass(frozen=True)
class Schedule:
    """Hold what one run's schedules are made of; `epochs` is the length they were made for."""

    epochs: float
    base_lr: float
    tau_base: float
    peak_lr: float
    warmup: float
    full_px: int
    ramp: CropRamp | None
    tau_rises: bool = True

    def learning_rate(self, progress: float) -> float:
        """Give the learning rate at a progress."""
        return learning_rate(progress, peak=self.peak_lr, warmup=self.warmup)

    def tau(self, progress: float) -> float:
        """Give the target's rate at a progress."""
        return ema_rate(progress, base=self.tau_base, rises=self.tau_rises)

    def crop_px(self, progress: float) -> int:
        """Give the side of a training view at a progress."""
        return crop_px(progress, full_px=self.full_px, ramp=self.ramp)


def planned(recipe: Recipe, *, epochs: float, warmup_max: float = 1.0) -> Schedule:
    """Make the schedules of a run of that many epochs: peaks from the presets, a warm-up of at most that share."""
    base_lr, tau_base = peaks(recipe, epochs=epochs)
    return Schedule(
        epochs=epochs,
        base_lr=base_lr,
        tau_base=tau_base,
        peak_lr=base_lr * recipe.batch_size / 256,
        warmup=min(recipe.optim.warmup_epochs / epochs, warmup_max),
        full_px=recipe.crop_px,
        ramp=recipe.crop_ramp,
        tau_rises=recipe.optim.tau_rises,
    )


def relative_cost(recipe: Recipe) -> float:
    """Give the mean cost of a step over the run, in (0, 1], against one at full crop size; cost goes as pixels."""
    if recipe.crop_ramp is None:
        return 1.0
    early = [(px / recipe.crop_px) ** 2 for px in recipe.crop_ramp.sizes_px]
    return recipe.crop_ramp.until * sum(early) / len(early) + 1 - recipe.crop_ramp.until
