"""Interfaces of the parts of a run that can be replaced: encoder, objective and optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastbyol.config import EncoderConfig, ObjectiveConfig, OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.model.base_encoder import Encoder
from fastbyol.model.foreign import adapt, draw_weights
from fastbyol.registry import ENCODERS, OBJECTIVES, OPTIMIZERS

__all__ = ["Encoder", "Optimizer", "build_encoder", "build_objective", "build_optimizer", "count_moments"]

OURS = "fastbyol.model.resnet:build"  # draws from a generator of its own, on any device


class Optimizer(Protocol):
    """An optimiser of the online network whose step also moves the targets by the EMA.

    `skipped`: steps left out because of inf or NaN in a gradient, in all and in a row up to now, int32 [2] on the
    parameters' device. `tau`: the EMA rate, a scalar there. One that keeps more than one tensor of its size for a
    parameter says how many as `moments`, see count_moments. One whose step raises for a parameter without a gradient
    has `needs_gradients` True: a run with such a parameter is then refused before it begins.
    """

    is_capturable: bool  # a CUDA graph can hold step()
    skips_bad_steps: bool  # inf or NaN in a gradient change nothing but `skipped`
    skipped: Tensor

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """The tensors that steps change, by parameter and name, as in torch's optimisers."""
        ...

    @property
    def tau(self) -> Tensor:
        """The EMA rate of the last set_rates."""
        ...

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        ...

    def set_rates(self, *, lr: float, tau: float) -> None:
        """Set the learning rate, which `predictor_lr_scale` multiplies for predictors, and tau for the next step."""
        ...

    def step(self) -> Any:
        """Update parameters and targets in place."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore the state that state_dict returned."""
        ...


def build_encoder(config: EncoderConfig, *, seed: int | None, views: int = 1) -> Encoder:
    """Build the encoder named by config.arch, with weights that depend only on (config, seed).

    seed None: the weights are replaced afterwards. views: how many populations, one after the other, its batch norms
    take a batch as in train mode. A network that is no Encoder becomes one, see fastbyol.model.foreign. Raises
    ConfigError where the encoder cannot be imported or called so, is no network, is an Encoder without its attributes,
    or has parameters of another type than float32, or lazy ones.
    """
    is_ours = ENCODERS.get(config.arch) == OURS
    with nullcontext() if is_ours else draw_weights(seed):
        given = () if _takes_nothing(ENCODERS.find(config.arch)) else (config,)
        encoder = ENCODERS.build(config.arch, *given, **({"seed": seed, "views": views} if given else {}))
        if isinstance(encoder, nn.Module) and not is_ours:
            _check_parameters(encoder, config)
        if isinstance(encoder, nn.Module) and not isinstance(encoder, Encoder):
            encoder = adapt(encoder, config, views=views)
    if not isinstance(encoder, Encoder):
        raise ConfigError(
            f"encoder {config.arch!r} built a {type(encoder).__name__}; return a torch.nn.Module, or a subclass of "
            "fastbyol.model.parts.Encoder"
        )
    for name, kind in (("config", EncoderConfig), ("features", int)):
        if not isinstance(getattr(encoder, name, None), kind):
            raise ConfigError(f"encoder {config.arch!r} has no {name}; set it to the {kind.__name__} in __init__")
    return encoder if is_ours else encoder.to(torch.get_default_device())


def _check_parameters(network: nn.Module, config: EncoderConfig) -> None:
    """Raise ConfigError for the first parameter that no optimiser or moving average of ours can update as it should."""
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(
                f"encoder {config.arch!r} has a lazy parameter {name}, of no size yet; map an image by the network "
                "before you return it"
            )
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"encoder {config.arch!r} has a parameter {name} of {parameter.dtype}; build it in torch.float32, in "
                "which weights and their moving average are kept (--precision bfloat16 computes in bfloat16)"
            )


def _takes_nothing(part: Any) -> bool:
    """Tell whether a function or class is called without arguments, as a user's network may be."""
    try:
        return not inspect.signature(part).parameters
    except (TypeError, ValueError):  # no callable, or one that has no signature
        return False


def build_objective(config: ObjectiveConfig, *, dimensions: int, seed: int) -> nn.Module:
    """Build the loss named by config.loss; raise ConfigError where it cannot be imported or called, or is none."""
    objective = OBJECTIVES.build(config.loss, config, dimensions=dimensions, seed=seed)
    if not isinstance(objective, nn.Module):
        raise ConfigError(f"objective {config.loss!r} built a {type(objective).__name__}; return a torch.nn.Module")
    return objective


def build_optimizer(
    name: str, module: nn.Module, target_of: Mapping[nn.Parameter, Tensor], config: OptimConfig
) -> Optimizer:
    """Build the optimiser of this name; raise ConfigError where it cannot be imported, called so, or lacks a member."""
    optimizer: Optimizer = OPTIMIZERS.build(name, module, target_of, config)
    wanted = [each for each in (*Optimizer.__annotations__, *vars(Optimizer)) if not each.startswith("_")]
    missing = [each for each in wanted if not hasattr(optimizer, each)]
    if missing:
        raise ConfigError(
            f"optimizer {name!r} built a {type(optimizer).__name__} without {', '.join(missing)}; see "
            "fastbyol.model.parts.Optimizer"
        )
    return optimizer


def count_moments(optimizer: object) -> int:
    """Return how many tensors of its size an optimiser, or the class or function of one, keeps for a parameter.

    It is their attribute `moments`, or 1 where they have none. Memory and checkpoints are predicted by it.
    """
    found: int = getattr(optimizer, "moments", 1)
    return found
