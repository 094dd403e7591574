"""Know the named recipes; every constant stands beside its source ("P" the paper, "DM" the authors' released code)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastbyol.config import ConfigError, EncoderConfig, HeadConfig, OptimConfig, Recipe, ViewConfig

PAPER_VIEWS = (ViewConfig(), ViewConfig(blur=0.1, solarize=0.2))  # T and T', P appendix B


def imagenet_rn50() -> Recipe:
    """ResNet-50 on ImageNet, 100 epochs, batch 4096: P section 3.3, the 100-epoch constants of DM."""
    return Recipe(
        name="imagenet_rn50",
        encoder=EncoderConfig("resnet50"),
        head=HeadConfig(hidden=4096, out=256),  # P section 3.3
        views=PAPER_VIEWS,
        optim=OptimConfig(base_lr=0.45, weight_decay=1e-6, tau_base=0.99),  # DM presets
        crop_px=224,
        batch_size=4096,
        epochs=100,
        eval_px=224,
        eval_margin=224 / 256,  # P appendix C.1
    )


def imagenette_rn18() -> Recipe:
    """ResNet-18 on Imagenette at 128 px, batch 256, 1000 epochs: DM's recipe, about 92.3 online top-1."""
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
        eval_margin=224 / 256,
    )


def cifar10_rn18() -> Recipe:
    """ResNet-18 with the CIFAR stem on CIFAR-10, 200 epochs: sizes of public baselines, DM's small-data rates."""
    return Recipe(
        name="cifar10_rn18",
        encoder=EncoderConfig("resnet18", stem="cifar"),
        head=HeadConfig(hidden=1024, out=256),  # lightly's CIFAR-10 benchmark
        views=PAPER_VIEWS,
        optim=OptimConfig(base_lr=2.0, weight_decay=1e-6, tau_base=0.99),  # DM Imagenette; tau of P's 300-epoch preset
        crop_px=32,
        batch_size=512,
        epochs=200,
        eval_px=32,
    )


def cifar10_tiny() -> Recipe:
    """ResNet-8 of half width for CIFAR-10 on two CPU cores, in minutes; constants measured in docs/log.md.

    Brightness, contrast and hue are jittered half as much as in the paper, which scored higher in one short run.
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


def demo() -> Recipe:
    """The demo set of fastbyol-prep, in 90 seconds on two CPU cores; constants measured in docs/log.md."""
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


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (demo, cifar10_tiny, cifar10_rn18, imagenette_rn18, imagenet_rn50)
}


def named(name: str) -> Recipe:
    """Build the recipe of that name; raise ConfigError listing the names when there is none."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
