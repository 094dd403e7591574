"""The parameters that an optimiser moves: their gradients, and which of them decay."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from fastbyol.errors import ConfigError

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


def parameter_groups(module: nn.Module, *, weight_decay: float, trust: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: weights have trust and decay; those that is_excluded names have neither."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    weights, others = ([p for name, p in trainable if is_excluded(name, p) == left_out] for left_out in (False, True))
    return [
        {"params": weights, "weight_decay": weight_decay, "trust": trust},
        {"params": others, "weight_decay": 0.0, "trust": None},
    ]


def is_excluded(name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter is neither decayed nor adapted: biases, norms, layer scale, positions, tokens.

    Biases and norms are vectors; layer scale and tokens have one side above 1, too, as [C, 1, 1] or [1, 1, C].
    Embeddings of positions and lists of tokens are known by their names.
    """
    is_vector = parameter.ndim <= 1 or (parameter.ndim > 2 and parameter.numel() == max(parameter.shape))
    return is_vector or EXCLUDED.search(name.rpartition(".")[2]) is not None
