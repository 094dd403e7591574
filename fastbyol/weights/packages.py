"""Pretrained weights of torchvision and timm, by the name of a network; neither package is needed otherwise."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any
from urllib.error import URLError

from torch import Tensor

from fastbyol.errors import ConfigError

PACKAGES = ("torchvision", "timm")


def pretrained(package: str, name: str) -> dict[str, Tensor]:
    """Return the tensors of a package's network with its default pretrained weights, which it fetches once.

    Raises ConfigError where the package is missing, knows no such network, has no weights for it or cannot fetch them.
    """
    try:
        network = _torchvision(name) if package == "torchvision" else _timm(name)
    except (ValueError, RuntimeError, OSError, URLError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).partition("\n")[0].split())
        raise ConfigError(
            f"{package}:{name} cannot be loaded ({reason}); give a network that {package} has pretrained weights for, "
            "such as resnet50, or a file of them"
        ) from error
    tensors: dict[str, Tensor] = network.state_dict()
    return tensors


def _import(package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises RuntimeError
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"weights of {package} need the package, which cannot be imported ({reason}); pip install {package}, or "
            "give a file of the weights"
        ) from error


def _torchvision(name: str) -> Any:
    return _import("torchvision", "torchvision.models").get_model(name, weights="DEFAULT")


def _timm(name: str) -> Any:
    return _import("timm", "timm").create_model(name, pretrained=True)
