"""Train an encoder of your own: this module has one, which fastbyol finds by the name own_encoder:build.

Usage: python examples/own_encoder.py TRAIN.beton VAL.beton OUT 60s
Afterwards: PYTHONPATH=examples fastbyol-eval linear OUT --train TRAIN.beton --val VAL.beton
"""

import sys
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastbyol.budget import parse_duration
from fastbyol.config import Config, EncoderConfig
from fastbyol.model.batchnorm import BatchNormAct2d
from fastbyol.model.parts import Encoder
from fastbyol.model.resnet import init_
from fastbyol.recipes import named
from fastbyol.train import run


class Patches(Encoder):
    """Patches of four pixels a side, mixed by depthwise and pointwise convolutions; their mean over the image."""

    def __init__(self, config: EncoderConfig, *, views: int) -> None:
        super().__init__()
        self.config, self.features = config, round(64 * config.width)
        width = self.features
        layers = [nn.Conv2d(3, width, 4, 4, bias=False), BatchNormAct2d(width, views=views)]
        for _ in range(3):
            layers += [
                nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False),
                BatchNormAct2d(width, views=views),
            ]
            layers += [nn.Conv2d(width, width, 1, bias=False), BatchNormAct2d(width, views=views)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to representations [N, features]."""
        return self.layers(images).mean((2, 3))


def build(config: EncoderConfig, *, seed: int | None, views: int) -> Patches:
    """Build the encoder; seed None: its weights are loaded afterwards."""
    encoder = Patches(config, views=views)
    if seed is not None:
        init_(encoder, torch.Generator().manual_seed(seed))
    return encoder


if __name__ == "__main__":
    train, val, out, budget = sys.argv[1:]
    recipe = named("demo")
    recipe = replace(recipe, encoder=EncoderConfig("own_encoder:build", width=1.0))
    result = run(Config(recipe, data=train, val=val, budget_s=parse_duration(budget)), out, overwrite=True)
    if result is not None:
        before, after = result["knn_top1_random_init"], result["knn_top1"]
        print(f"kNN {before:.1f} % -> {after if after is None else round(after, 1)} %")
