"""Know what is timed: views, the optimiser, the step and the loader, with the sizes the recipes use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Case
from fastbyol import optim, views
from fastbyol.beton import Reader
from fastbyol.byol import BYOL
from fastbyol.encoder import build
from fastbyol.loaders.native import load
from fastbyol.order import stream
from fastbyol.recipes import PAPER_VIEWS, named
from fastbyol.step import train_step

SEED = 0


def view_cases() -> list[Case]:
    """Make both views: small images as they are, photographs to 224 px."""
    return [
        _views(batch, height, width, crop_px)
        for batch, height, width, crop_px in ((256, 32, 32, 32), (16, 375, 500, 224))
    ]


def _views(batch: int, height: int, width: int, crop_px: int) -> Case:
    pixels = torch.from_numpy(np.random.default_rng(SEED).integers(0, 256, batch * height * width * 3, np.uint8))
    offsets, sizes = torch.arange(batch) * height * width * 3, torch.tensor([[height, width]] * batch)

    def run() -> torch.Tensor:
        indices = np.arange(batch)
        drawn = views.draw(PAPER_VIEWS, seed=SEED, epochs=indices * 0, indices=indices, sizes=sizes.numpy())
        return views.apply(pixels, offsets, sizes, drawn, crop_px=crop_px)

    return Case("views", f"{batch} of {height}x{width} to 2x{crop_px}", "reference", run, images=batch)


def optimizer_cases() -> list[Case]:
    """Step LARS with its EMA target over the tensors of a ResNet-50; without the target beside it."""
    cases = []
    for name in ("lars", "lars+ema"):
        encoder, target = (
            build(named("imagenet_rn50").encoder, seed=SEED),
            build(named("imagenet_rn50").encoder, seed=1),
        )
        for parameter in encoder.parameters():
            parameter.grad = torch.ones_like(parameter)
        pairs = dict(zip(encoder.parameters(), target.parameters(), strict=True)) if name == "lars+ema" else {}
        lars = optim.build(encoder, pairs, named("imagenet_rn50").optim)
        lars.set_rates(lr=0.1, tau=0.99)
        cases.append(Case("optimizer", "resnet50", name, lars.step))
    return cases


def step_cases() -> list[Case]:
    """Take whole training steps on given views: forward, backward, LARS, EMA."""
    return [
        Case("step", f"{name}, batch {named(name).batch_size}", "eager", _step(name), images=named(name).batch_size)
        for name in ("demo", "cifar10_tiny")
    ]


def _step(name: str) -> Callable[[], object]:
    recipe = named(name)
    model = BYOL(recipe.encoder, recipe.head, seed=SEED)
    lars = optim.build(model, model.target_of(), recipe.optim)
    images = torch.randn(2 * recipe.batch_size, 3, recipe.crop_px, recipe.crop_px)
    images = images.to(memory_format=torch.channels_last)
    return lambda: train_step(model, lars, images, lr=0.1, tau=0.99)


def loader_cases(data: Path, *, batch_size: int, workers: int) -> list[Case]:
    """Decode batches of a file, each image once."""
    reader = Reader(data)
    rows = stream(0, batch_size=batch_size, count=len(reader), seed=SEED)
    batches = load(reader, rows, workers=workers)
    taken = 20
    return [
        Case(
            "loader",
            f"{data.name}, batch {batch_size}, {workers} workers",
            "native",
            lambda: list(itertools.islice(batches, taken)),
            images=taken * batch_size,
            dtype="uint8",
        )
    ]
