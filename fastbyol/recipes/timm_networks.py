"""Recipes for networks of timm on Imagenette, trained by AdamW; no score of theirs has been measured."""

from __future__ import annotations

from dataclasses import replace

from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig, Recipe
from fastbyol.recipes.purpose import ONE_GPU, meant_for
from fastbyol.recipes.small import imagenette_rn18

TAU = 0.996  # P, 1000 epochs, the length of DM's Imagenette recipe


@meant_for("Imagenette", ONE_GPU)
def imagenette_vit_small() -> Recipe:
    """Build ViT-S/16 on Imagenette at 128 px: views, sizes and length of DM's Imagenette, optimisation of MoCo v3.

    Source: facebookresearch/moco-v3, CONFIG.md, ViT-Small: AdamW at 1.5e-4 per 256 images, decay 0.1, 40 epochs of
    warm-up, a patch embedding that stays random, which keeps training stable; its vits.py and builder.py: a projector
    of three layers. timm's network has 6 heads where MoCo v3's has 12, and learns its positions.
    """
    return replace(
        imagenette_rn18(),
        name="imagenette_vit_small",
        encoder=EncoderConfig("timm:vit_small_patch16_224", frozen="patch_embed"),
        head=HeadConfig(hidden=4096, out=256, projector_depth=3),
        optim=OptimConfig(base_lr=1.5e-4, weight_decay=0.1, tau_base=TAU, warmup_epochs=40, optimizer="adamw"),
        presets=(),
    )


@meant_for("Imagenette", ONE_GPU)
def imagenette_convnext_tiny() -> Recipe:
    """Build ConvNeXt-T on Imagenette at 128 px: views, heads, sizes and length of DM's Imagenette, AdamW of ConvNeXt.

    Source: facebookresearch/ConvNeXt, TRAINING.md and the defaults of main.py: AdamW at 4e-3 for 4096 images, which is
    2.5e-4 per 256, decay 0.05, 20 epochs of warm-up. Those are of training with labels; without its stochastic depth.
    """
    return replace(
        imagenette_rn18(),
        name="imagenette_convnext_tiny",
        encoder=EncoderConfig("timm:convnext_tiny"),
        optim=OptimConfig(base_lr=2.5e-4, weight_decay=0.05, tau_base=TAU, warmup_epochs=20, optimizer="adamw"),
        presets=(),
    )
