"""Pretrained weights of torchvision and timm, by the name of a network; neither package is needed otherwise."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

from torch import Tensor

from fastbyol.errors import ConfigError
from fastbyol.model.libraries import import_library

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


def _torchvision(name: str) -> Any:
    torchvision = import_library("torchvision", claim="weights of torchvision need the package")
    return torchvision.models.get_model(name, weights="DEFAULT")


def _timm(name: str) -> Any:
    return import_library("timm", claim="weights of timm need the package").create_model(name, pretrained=True)
