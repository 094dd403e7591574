"""Start of a run from weights: an encoder alone or with heads; the target network begins as a copy, as in every run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastbyol.config import Config, EncoderConfig
from fastbyol.errors import ConfigError, require
from fastbyol.model.byol import BYOL
from fastbyol.weights import Weights, read
from fastbyol.weights.match import check_finite, match


def settle(config: Config, recorded: Config | None) -> tuple[str | None, str | None]:
    """Return what a run starts from and its digest; recorded: the configuration of the run that goes on, if one does.

    Such a run keeps the weights it began with: they need not be given, nor be there any more, once it has a checkpoint.
    Raises ConfigError where others are given.
    """
    if recorded is None:
        return config.init, None  # a digest in a file of settings is that of another run's start
    if config.init is not None and config.init != recorded.init and read(config.init).digest != recorded.init_digest:
        began = "the run began with drawn weights" if recorded.init is None else f"the run began with {recorded.init}"
        raise ConfigError(f"--init {config.init} is given, but {began}; leave --init out, or give another --out")
    return recorded.init, recorded.init_digest


def read_start(config: Config) -> Weights:
    """Read the weights that a configuration names; raise ConfigError where they are not those of its digest."""
    assert config.init is not None
    weights = read(config.init)
    require(
        config.init_digest in (None, weights.digest),
        f"{config.init} holds other weights than the run began with; give those, or another --out",
    )
    return weights


@torch.no_grad()
def start_(model: BYOL, weights: Weights) -> str:
    """Load weights into a model; return a line on what was taken. Raises ConfigError where they do not fit."""
    encoder = model.online.encoder
    check_network(weights, encoder.config)
    taken, left = match(weights.encoder, encoder.state_dict(), source=weights.source)
    encoder.load_state_dict(taken)
    notes = [left] if left else []
    heads = {"projector.": model.online.projector, "predictor.": model.predictor}
    has_heads = bool(weights.heads) and _load_heads(heads, weights)
    if weights.heads and not has_heads:
        notes.append("its heads have other sizes, so the heads begin anew")
    local = model.local_predictor
    if has_heads and local is not None and not _load_heads({"local_predictor.": local}, weights):
        notes.append("it has no predictor for local views of this size, so that one begins anew")
    if model.target is not None:
        model.target.load_state_dict(model.online.state_dict())
    parts = "encoder and heads" if has_heads else "encoder"
    return "; ".join((f"starts from {weights.source}: {parts}", *notes))


def _load_heads(modules: Mapping[str, nn.Module], weights: Weights) -> bool:
    """Load modules, each under its prefix of HEADS, if all sizes are theirs; tell whether they are.

    Raises ConfigError where a number of theirs is not finite.
    """
    own = {prefix + name: value for prefix, module in modules.items() for name, value in module.state_dict().items()}
    given = {name: value for name, value in weights.heads.items() if name.startswith(tuple(modules))}
    if _shapes(given) != _shapes(own):
        return False
    taken = {name: given.get(name, value) for name, value in own.items()}
    check_finite(taken, own, source=weights.source)
    for prefix, module in modules.items():
        module.load_state_dict({name: taken[prefix + name] for name in module.state_dict()})
    return True


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
