"""Every operation outside the convolutions in plain torch: CPU and CUDA, any floating dtype.

In `views` images are x [N, 3, H, W] in [0, 1], and every operation but `normalize` keeps them there. Where an operation
takes `drawn` [N] bool, the other images pass unchanged. Only `out`, running statistics and the arguments of functions
whose names end in `_` are written to.
"""

from __future__ import annotations

from fastbyol.kernels.reference.batchnorm import (
    batch_norm_act,
    batch_norm_add_relu,
    batch_norm_eval,
    check_channels,
    check_residual,
    check_views,
    max_pool,
)
from fastbyol.kernels.reference.step import (
    NORM_EPS,
    LarsGroup,
    LarsRates,
    byol_loss,
    ema_,
    ema_loss,
    lars_ema_,
    normalize_rows,
)
from fastbyol.kernels.reference.views import (
    CHUNK_PIXELS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER,
    KEYS_CUBIC,
    LUMA,
    augment,
    bicubic_weights,
    brightness,
    chunks,
    color_jitter,
    contrast,
    gaussian_blur,
    gaussian_matrix,
    grayscale,
    hue,
    normalize,
    random_resized_crop,
    saturation,
    solarize,
    unpack_planes,
    value_and_chroma,
    views_out,
)

__all__ = [
    "CHUNK_PIXELS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "JITTER",
    "KEYS_CUBIC",
    "LUMA",
    "NORM_EPS",
    "LarsGroup",
    "LarsRates",
    "augment",
    "batch_norm_act",
    "batch_norm_add_relu",
    "batch_norm_eval",
    "bicubic_weights",
    "brightness",
    "byol_loss",
    "check_channels",
    "check_residual",
    "check_views",
    "chunks",
    "color_jitter",
    "contrast",
    "ema_",
    "ema_loss",
    "gaussian_blur",
    "gaussian_matrix",
    "grayscale",
    "hue",
    "lars_ema_",
    "max_pool",
    "normalize",
    "normalize_rows",
    "random_resized_crop",
    "saturation",
    "solarize",
    "unpack_planes",
    "value_and_chroma",
    "views_out",
]
