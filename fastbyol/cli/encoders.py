"""The encoder that a command line names: of a run, a file, a package or drawn, and how it sees images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastbyol.cli.trained import open_run
from fastbyol.config import EncoderConfig, Recipe
from fastbyol.errors import ConfigError, require
from fastbyol.export import IN_FOLDER
from fastbyol.model.parts import Encoder, build_encoder
from fastbyol.recipes import RECIPES, named
from fastbyol.registry import ENCODERS
from fastbyol.storage.run_folder import RunFolder
from fastbyol.weights import Weights, read
from fastbyol.weights.match import match, recognize
from fastbyol.weights.packages import PACKAGES

DRAWN = "random"
USUAL_PX, USUAL_MARGIN = 224, 0.875  # of networks that others trained on ImageNet, DeepMind's among them


class Named(NamedTuple):
    """An encoder in evaluation, what it was built from, the side (None: nothing says) and margin of its images.

    folder: where scores of it are kept. seed: of the same network as drawn. is_drawn: it is that network. facts: what
    a score says of where the encoder comes from.
    """

    encoder: Encoder
    config: EncoderConfig
    px: int | None
    margin: float
    folder: RunFolder
    seed: int = 0
    is_drawn: bool = False
    facts: Mapping[str, Any] = MappingProxyType({})


def open_encoder(text: str, *, notify: Callable[[str], None]) -> Named:
    """Open the encoder that a text names; raise ConfigError or CheckpointError where that cannot be done.

    notify: is told in a line where a run has not finished, whose encoder is that of its newest checkpoint.
    """
    path = Path(text)
    if text.partition(":")[0] == DRAWN and not path.exists():
        return _drawn(text)
    if path.is_dir() and not (path / IN_FOLDER).is_file():  # as an export writes one
        run = RunFolder(path)
        trained = open_run(run, notify=notify)
        recipe, seed = trained.config.recipe, trained.config.seed
        return Named(
            trained.encoder, recipe.encoder, recipe.eval_px, recipe.eval_margin, run, seed, facts=trained.facts
        )
    folder = RunFolder(Path("runs") / re.sub(r"[^\w.]+", "-", text).strip("-."))
    weights = read(text)
    encoder = _built(weights)
    if weights.run is not None:
        recipe = weights.run.recipe
        return Named(encoder, recipe.encoder, recipe.eval_px, recipe.eval_margin, folder, weights.run.seed)
    px, margin = (None, 1.0) if weights.is_exported else (USUAL_PX, USUAL_MARGIN)
    return Named(encoder, encoder.config, px, margin, folder)


def settle_px(text: str, found: Named, px: int | None) -> int:
    """Return the side of the images an encoder sees: that given, or its own; raise ConfigError where none is known."""
    if px is None and found.px is None:
        raise ConfigError(f"{text} does not say at what size it sees images; give it, as in --px {USUAL_PX}")
    return px or found.px or USUAL_PX


def _built(weights: Weights) -> Encoder:
    """Build the encoder of weights; a file's own, which names code, is refused."""
    config = weights.config or _recognized(weights)
    require(
        config.arch in ENCODERS or weights.run is not None,
        f"{weights.source} wants code of its own, {config.arch!r}, which could do anything; give the folder of its run",
    )
    encoder = build_encoder(config, seed=None)
    encoder.load_state_dict(match(weights.encoder, encoder.state_dict(), source=weights.source)[0])
    return encoder.eval()


def _recognized(weights: Weights) -> EncoderConfig:
    """Return the ResNet of ours that weights are of, else the package's network of the name they came by."""
    try:
        return recognize(weights.encoder, source=weights.source)
    except ConfigError:
        if weights.source.partition(":")[0] not in PACKAGES:
            raise
        return EncoderConfig(weights.source)


def _drawn(text: str) -> Named:
    """Draw the encoder of "random:NAME", of a recipe or an encoder; without a name the paper's ResNet-50."""
    name = text.partition(":")[2] or "resnet50"
    recipe: Recipe | None = named(name) if name.partition("+")[0] in RECIPES else None
    try:
        config = EncoderConfig(name) if recipe is None else recipe.encoder
    except ConfigError as error:
        raise ConfigError(f"{error}; or give {DRAWN}:RECIPE") from error
    px, margin = (USUAL_PX, USUAL_MARGIN) if recipe is None else (recipe.eval_px, recipe.eval_margin)
    folder = RunFolder(Path("runs") / re.sub(r"[^\w.]+", "-", f"{DRAWN}-{name}"))
    return Named(build_encoder(config, seed=0).eval(), config, px, margin, folder, is_drawn=True)
