"""The paper's recipes for ImageNet ("P" is the paper, "DM" the authors' released code)."""

from __future__ import annotations

from dataclasses import replace

from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig, Preset, Recipe, ViewConfig
from fastbyol.recipes.purpose import MANY_GPUS, ONE_GPU, meant_for

PAPER_VIEWS = (ViewConfig(), ViewConfig(blur=0.1, solarize=0.2))  # T and T', P appendix B
PRESETS = (  # DM, for batch 4096
    Preset(epochs=40, base_lr=0.45, tau_base=0.97),
    Preset(epochs=100, base_lr=0.45, tau_base=0.99),
    Preset(epochs=300, base_lr=0.3, tau_base=0.99),
    Preset(epochs=1000, base_lr=0.2, tau_base=0.996),
)


@meant_for("ImageNet", MANY_GPUS)
def imagenet_rn50() -> Recipe:
    """Build ResNet-50 on ImageNet, 100 epochs, batch 4096: P section 3.3, the 100-epoch constants of DM."""
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
        presets=PRESETS,
    )


@meant_for("ImageNet", MANY_GPUS)
def imagenet_rn50_e40() -> Recipe:
    """Build ResNet-50 for 40 epochs: DM presets; 61.5 linear top-1 by its authors (issue 76 of their code)."""
    optim = OptimConfig(base_lr=0.45, weight_decay=1e-6, tau_base=0.97)
    return replace(imagenet_rn50(), name="imagenet_rn50_e40", optim=optim, epochs=40)


@meant_for("ImageNet", MANY_GPUS)
def imagenet_rn50_e300() -> Recipe:
    """Build ResNet-50 for 300 epochs: P appendix F, the base of every ablation; 72.5 linear top-1."""
    optim = OptimConfig(base_lr=0.3, weight_decay=1e-6, tau_base=0.99)
    return replace(imagenet_rn50(), name="imagenet_rn50_e300", optim=optim, epochs=300)


@meant_for("ImageNet", MANY_GPUS)
def imagenet_rn50_e1000() -> Recipe:
    """Build ResNet-50 for 1000 epochs: P section 3.3; 74.3 linear top-1."""
    optim = OptimConfig(base_lr=0.2, weight_decay=1.5e-6, tau_base=0.996)
    return replace(imagenet_rn50(), name="imagenet_rn50_e1000", optim=optim, epochs=1000)


@meant_for("ImageNet", ONE_GPU)
def imagenet_rn50_b512_e1000() -> Recipe:
    """Build ResNet-50 at batch 512 for 1000 epochs: P appendix G; 73.7 linear top-1."""
    optim = OptimConfig(base_lr=0.4, weight_decay=1.5e-6, tau_base=0.9995)
    return replace(imagenet_rn50_e1000(), name="imagenet_rn50_b512_e1000", optim=optim, batch_size=512, presets=())


@meant_for("ImageNet", MANY_GPUS)
def imagenet_rn50x2_e1000() -> Recipe:
    """Build ResNet-50 of twice the width, 94 million parameters: P table 1; 77.4 linear top-1."""
    return replace(imagenet_rn50_e1000(), name="imagenet_rn50x2_e1000", encoder=EncoderConfig("resnet50", width=2))


@meant_for("ImageNet", MANY_GPUS)
def imagenet_rn50x4_e1000() -> Recipe:
    """Build ResNet-50 of four times the width, 375 million parameters: P table 1; 78.6 linear top-1."""
    return replace(imagenet_rn50_e1000(), name="imagenet_rn50x4_e1000", encoder=EncoderConfig("resnet50", width=4))


@meant_for("ImageNet", MANY_GPUS)
def imagenet_rn200x2_e1000() -> Recipe:
    """Build ResNet-200 of twice the width, 250 million parameters: P table 1; 79.6 linear top-1."""
    return replace(imagenet_rn50_e1000(), name="imagenet_rn200x2_e1000", encoder=EncoderConfig("resnet200", width=2))
