"""Networks of timm and torchvision by name, without their classifiers: encoders timm:NAME and torchvision:NAME."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError, require

# arguments with which timm's networks take images of any size; which a name takes is known only of the class it builds
ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "strict_img_size": False},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)
BUILD = re.compile(r"cpu|cu\d+")  # in a version of torch, after the +: what its packages at pytorch.org are named for


def build_timm(config: EncoderConfig, *, seed: int | None, views: int) -> nn.Module:  # noqa: ARG001 - of every builder
    """Build timm:NAME without its classifier, for images of any size where timm's network takes them."""
    name, timm = _name(config), import_library("timm", claim=f"encoder {config.arch} needs timm")
    base = name.partition(".")[0]
    _require_known(base, timm.list_models(), config)
    given: dict[str, Any] = {"num_classes": 0, "in_chans": config.channels}
    try:
        return _first_taken(partial(timm.create_model, name, pretrained=False, **given), ANY_SIZE)
    except RuntimeError as error:  # of a tag that the network does not have
        raise ConfigError(f"encoder {config.arch} cannot be built ({error}); give timm:{base}") from error


def _first_taken(build: Callable[..., nn.Module], choices: Sequence[dict[str, Any]]) -> nn.Module:
    """Build a network with the first arguments that it takes; others are refused before anything is built."""
    for arguments in choices[:-1]:
        with suppress(TypeError):  # as Python, or timm itself, says that an argument is not known
            return build(**arguments)
    return build(**choices[-1])


def build_torchvision(config: EncoderConfig, *, seed: int | None, views: int) -> nn.Module:  # noqa: ARG001 - of every builder
    """Build torchvision:NAME, one of its classifiers, with the identity in the place of the last linear layer."""
    name, models = _name(config), import_library("torchvision", claim=f"encoder {config.arch} needs torchvision").models
    _require_known(name, models.list_models(module=models), config)
    network: nn.Module = models.get_model(name, weights=None)
    linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    require(bool(linear), f"encoder {config.arch} ends in no linear layer; give another network")
    classifier = network.get_submodule(linear[-1])
    network.num_features = classifier.in_features
    network.set_submodule(linear[-1], nn.Identity())
    if config.channels != 3:
        _take_channels_(network, config.channels)
    return network


def _take_channels_(network: nn.Module, channels: int) -> None:
    """Replace the first convolution by one of this many input channels."""
    path, first = next((path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    made = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]  # pairs
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    network.set_submodule(path, made)


def import_library(package: str, *, claim: str) -> ModuleType:
    """Import timm or torchvision; raise ConfigError that begins with `claim`, on what needs it, where that fails."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that another torch was built for
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{claim}, which cannot be imported ({reason}); {_remedy(package, error)}") from error


def _remedy(package: str, error: Exception) -> str:
    """Say what to do where the import of timm or torchvision, which timm imports, failed."""
    if isinstance(error, ModuleNotFoundError):
        return f"pip install 'fastbyol[{package}]'"
    if package != "torchvision" and "torchvision" not in str(error):
        return f"{package} is installed, and something that it imports does not fit it; pip check may name that"
    advice = f"install the build of torchvision for torch {torch.__version__}, which is installed"
    build = torch.__version__.partition("+")[2]
    if not BUILD.fullmatch(build):
        return advice
    return (
        f"{advice}: pip uninstall torchvision; pip install torchvision torch=={torch.__version__} "
        f"--index-url https://download.pytorch.org/whl/{build}"
    )


def _name(config: EncoderConfig) -> str:
    """Return the network's name in its library; raise ConfigError for settings of fastbyol's ResNets."""
    require(
        (config.width, config.stem, config.padding) == (1, "imagenet", "symmetric"),
        f"encoder {config.arch} with width {config.width:g}, stem {config.stem} and padding {config.padding}, which "
        f"are settings of fastbyol's ResNets; give RECIPE+encoder={config.arch}, which leaves them out",
    )
    return config.arch.partition(":")[2]


def _require_known(name: str, known: Collection[str], config: EncoderConfig) -> None:
    if name not in known:
        library = config.arch.partition(":")[0]
        alike = (
            ", ".join(f"{library}:{each}" for each in difflib.get_close_matches(name, known, n=3)) or "none is alike"
        )
        raise ConfigError(f"{library} has no network {name!r} for images; give one it lists, such as {alike}")
