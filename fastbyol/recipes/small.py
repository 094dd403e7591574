"""Recipes for small data sets: those of the authors' code ("DM"), and our own for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig, Recipe, ViewConfig
from fastbyol.recipes.imagenet import PAPER_VIEWS, PRESETS
from fastbyol.recipes.purpose import CPU, ONE_GPU, meant_for

# as in solo-learn's baseline, and lightly's but for the solarisation: without blur
CIFAR_VIEWS = (replace(PAPER_VIEWS[0], blur=0.0), replace(PAPER_VIEWS[1], blur=0.0))
AT_RATE_2 = tuple(replace(preset, base_lr=2.0) for preset in PRESETS)  # DM's small-data rate; tau follows the length


@meant_for("Imagenette", ONE_GPU)
def imagenette_rn18() -> Recipe:
    """Build ResNet-18 on Imagenette at 128 px, batch 256, 1000 epochs: DM's recipe, about 92.3 online top-1."""
    return Recipe(
        name="imagenette_rn18",
        encoder=EncoderConfig("resnet18"),
        head=HeadConfig(hidden=4096, out=256),
        views=PAPER_VIEWS,
        optim=OptimConfig(base_lr=2.0, weight_decay=1e-6, tau_base=0.996),  # DM; tau of the 1000-epoch preset
        crop_px=128,
        batch_size=256,
        epochs=1000,
        eval_px=128,
        eval_margin=128 / 160,  # DM replaces 224 by 128 and keeps the margin of 32 px
        presets=AT_RATE_2,
    )


@meant_for("ImageNet-100", ONE_GPU)
def imagenet100_rn18() -> Recipe:
    """Build ResNet-18 on 100 classes of ImageNet: sizes and length of solo-learn's baseline, DM's small-data rates.

    solo-learn's predictor is 8192 wide, this one 4096. solo-learn uses LARC at a ratio of 0.02, so its learning rate
    does not carry over.
    """
    return replace(
        imagenette_rn18(),
        name="imagenet100_rn18",
        optim=OptimConfig(base_lr=2.0, weight_decay=1e-6, tau_base=0.99),  # DM Imagenette; solo-learn's tau
        presets=(),
        crop_px=224,
        batch_size=256,  # 128 on each of two GPUs
        epochs=400,
        eval_px=224,
        eval_margin=224 / 256,
    )


@meant_for("CIFAR-10", ONE_GPU)
def cifar10_rn18() -> Recipe:
    """Build ResNet-18 with the CIFAR stem on CIFAR-10, 200 epochs: sizes of public baselines, DM's small-data rates."""
    return Recipe(
        name="cifar10_rn18",
        encoder=EncoderConfig("resnet18", stem="cifar"),
        head=HeadConfig(hidden=1024, out=256),  # lightly's CIFAR-10 benchmark
        views=CIFAR_VIEWS,
        optim=OptimConfig(base_lr=2.0, weight_decay=1e-6, tau_base=0.99),  # DM Imagenette; tau of P's 300-epoch preset
        crop_px=32,
        batch_size=512,
        epochs=200,
        eval_px=32,
        presets=AT_RATE_2,
    )


@meant_for("CIFAR-100", ONE_GPU)
def cifar100_rn18() -> Recipe:
    """Build ResNet-18 with the CIFAR stem on CIFAR-100: CIFAR-10's constants, which public baselines share."""
    return replace(cifar10_rn18(), name="cifar100_rn18")


@meant_for("STL-10", ONE_GPU)
def stl10_rn18() -> Recipe:
    """Build ResNet-18 on the 105 000 training and unlabelled images of STL-10 at 96 px: DM's small-data rates.

    Batch 256 is DM's for Imagenette, tau 0.99 that of P's 300-epoch preset. No published score is known.
    """
    return replace(
        imagenette_rn18(),
        name="stl10_rn18",
        optim=OptimConfig(base_lr=2.0, weight_decay=1e-6, tau_base=0.99),
        crop_px=96,
        epochs=300,
        eval_px=96,
        eval_margin=1.0,
    )


@meant_for("CIFAR-10", CPU)
def cifar10_tiny() -> Recipe:
    """Build ResNet-8 of half width for CIFAR-10 on two CPU cores, in minutes; constants measured in docs/log.md.

    Brightness, contrast and hue jitter are half the paper's, which scored higher in one short run.
    """
    view = ViewConfig(area=(0.2, 1.0), brightness=0.2, contrast=0.2, hue=0.05, grayscale=0.1, blur=0.5)
    return Recipe(
        name="cifar10_tiny",
        encoder=EncoderConfig("resnet8", width=0.5, stem="cifar_stride2"),
        head=HeadConfig(hidden=512, out=128),
        views=(view, replace(view, blur=0.1)),
        optim=OptimConfig(base_lr=3.0, weight_decay=1e-4, tau_base=0.97, warmup_epochs=0.5),
        crop_px=24,  # about 1.5 times the images/s of 32 for the same score after 75 s
        batch_size=64,
        epochs=5,
        eval_px=32,
    )


@meant_for("demo set", CPU)
def demo() -> Recipe:
    """Build the recipe for fastbyol-prep's demo set: 90 seconds on two CPU cores; constants measured in docs/log.md."""
    return Recipe(
        name="demo",
        encoder=EncoderConfig("resnet8", width=0.5, stem="cifar_stride2"),
        head=HeadConfig(hidden=512, out=128),
        views=PAPER_VIEWS,
        optim=OptimConfig(base_lr=2.0, weight_decay=1e-6, tau_base=0.97, warmup_epochs=0.5),
        crop_px=24,
        batch_size=64,
        epochs=10,
        eval_px=32,
    )
