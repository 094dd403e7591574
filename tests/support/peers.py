"""The import of torchvision beside a torch that its compiled operations were not built for: those are left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision without registering its compiled operations; raise ImportError where it is missing."""
    register = torch.library.register_fake

    def register_others(name: Any, *args: Any, **settings: Any) -> Callable[..., Any]:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **settings)

    torch.library.register_fake = register_others
    try:
        return importlib.import_module("torchvision")
    finally:
        torch.library.register_fake = register
