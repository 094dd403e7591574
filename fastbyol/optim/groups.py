"""The parameters that an optimiser moves: their gradients, and which of them decay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.errors import ConfigError

PREDICTORS = ("predictor.", "local_predictor.")
# "pos_embed", "pos_embedding", "relative_position_bias_table", "cls_token", "class_token", "mask_token"
EXCLUDED = re.compile(r"pos_embed|position|(^|_)tokens?$")


class MissingGradient(ConfigError, RuntimeError):
    """A parameter without a gradient: a wrong call in Python, or in a run a network that does not always use it."""


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter; raise MissingGradient where there is none."""
    if parameter.grad is None:
        raise MissingGradient(
            f"a parameter of shape {tuple(parameter.shape)} has no gradient, and an optimiser needs one for each: "
            "call backward() first, or leave parameters that the loss does not always use out, in a run by +frozen=NAME"
        )
    return parameter.grad


def parameter_groups(
    module: nn.Module, *, weight_decay: float, trust: float, predictor_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Split the trainable parameters: weights have trust and decay; those that is_excluded names have neither.

    A group has `params`, `weight_decay`, `trust` (None: ratio 1) and `lr_scale`, a multiple of the learning rate.
    With a `predictor_lr_scale` that is not 1, the parameters whose names begin with `predictor.` or `local_predictor.`
    are split likewise, into two groups of their own of that `lr_scale`, by which set_lr multiplies.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}  # two if the scale is 1, since the keys are the same twice
    for scale in (1.0, predictor_lr_scale):
        groups[scale, False] = {"params": [], "weight_decay": weight_decay, "trust": trust, "lr_scale": scale}
        groups[scale, True] = {"params": [], "weight_decay": 0.0, "trust": None, "lr_scale": scale}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = predictor_lr_scale if name.startswith(PREDICTORS) else 1.0
            groups[scale, is_excluded(name, parameter)]["params"].append(parameter)
    return list(groups.values())


def configured_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups, as parameter_groups does, by the settings of a run's optimiser."""
    return parameter_groups(
        module, weight_decay=config.weight_decay, trust=config.trust, predictor_lr_scale=config.predictor_lr_scale
    )


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of an optimiser's groups: `lr` times the `lr_scale` of each, 1 where it has none."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def is_excluded(name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter is neither decayed nor adapted: biases, norms, layer scale, positions, tokens.

    Biases and norms are vectors; layer scale and tokens have one side above 1, too, as [C, 1, 1] or [1, 1, C].
    Embeddings of positions and lists of tokens are known by their names.
    """
    is_vector = parameter.ndim <= 1 or (parameter.ndim > 2 and parameter.numel() == max(parameter.shape))
    return is_vector or EXCLUDED.search(name.rpartition(".")[2]) is not None
