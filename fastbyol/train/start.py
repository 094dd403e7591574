"""Start of a run from weights: an encoder alone or with heads; the target network begins as a copy, as in every run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastbyol.byol import BYOL
from fastbyol.config import Config, EncoderConfig
from fastbyol.errors import ConfigError, require
from fastbyol.weights import HEADS, Weights, read
from fastbyol.weights.match import match


def settle(config: Config, recorded: Config | None) -> Config:
    """Return the configuration with the digest of its weights; recorded: that of the run which goes on, if one does.

    Such a run keeps the weights it began with: they need not be given, nor be there any more, once it has a checkpoint.
    Raises ConfigError where others are given.
    """
    if recorded is None:
        return config if config.init is None else replace(config, init_digest=read(config.init).digest)
    if config.init is not None and config.init != recorded.init and read(config.init).digest != recorded.init_digest:
        began = "the run began with drawn weights" if recorded.init is None else f"the run began with {recorded.init}"
        raise ConfigError(f"--init {config.init} is given, but {began}; leave --init out, or give another --out")
    return replace(config, init=recorded.init, init_digest=recorded.init_digest)


@torch.no_grad()
def start_(model: BYOL, config: Config) -> str:
    """Load the weights that a configuration names into a model; return a line on what was taken.

    Raises ConfigError where they are not those of its digest, or do not fit.
    """
    assert config.init is not None
    weights = read(config.init)
    require(
        config.init_digest in (None, weights.digest),
        f"{config.init} holds other weights than the run began with; give those, or another --out",
    )
    encoder = model.online.encoder
    check_network(weights, encoder.config)
    taken, left = match(weights.encoder, encoder.state_dict(), source=weights.source)
    encoder.load_state_dict(taken)
    parts = ["encoder"]
    inner = {f"projector.{name}": value for name, value in model.online.projector.state_dict().items()}
    inner |= {f"predictor.{name}": value for name, value in model.predictor.state_dict().items()}
    fits = _shapes(weights.heads) == _shapes(inner)
    if weights.heads and fits:
        for head, module in zip(HEADS, (model.online.projector, model.predictor), strict=True):
            module.load_state_dict(
                {
                    name.removeprefix(head): weights.heads.get(name, value)
                    for name, value in inner.items()
                    if name.startswith(head)
                }
            )
        parts.append("heads")
    if model.target is not None:
        model.target.load_state_dict(model.online.state_dict())
    notes = [left] if left else []
    if weights.heads and not fits:
        notes.append("its heads have other sizes, so the heads begin anew")
    return f"starts from {weights.source}: {' and '.join(parts)}" + "".join(f"; {note}" for note in notes)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of what every library keeps of a layer."""
    return {name: value.shape for name, value in tensors.items() if not name.endswith("num_batches_tracked")}


def check_network(weights: Weights, wanted: EncoderConfig) -> None:
    """Raise ConfigError where weights are of a network that differs in what no tensor shows: stem and padding."""
    if weights.config is None:
        return
    for name in ("stem", "padding"):
        given, here = getattr(weights.config, name), getattr(wanted, name)
        require(
            given == here,
            f"{weights.source} is of a network with {name} {given}, the recipe's has {here}; "
            f"give RECIPE+{name}={given}",
        )
