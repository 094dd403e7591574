"""Imports of the peers that tests compare with; a test is skipped where its peer is missing."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """Import torchvision beside a torch its compiled operations were not built for: those are left out."""
    register = torch.library.register_fake

    def register_others(name: Any, *args: Any, **settings: Any) -> Callable[..., Any]:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **settings)

    torch.library.register_fake = register_others
    try:
        return pytest.importorskip("torchvision")
    finally:
        torch.library.register_fake = register


@pytest.fixture(scope="session")
def functional(torchvision: ModuleType) -> ModuleType:  # noqa: ARG001
    """Name torchvision's transforms as functions."""
    return pytest.importorskip("torchvision.transforms.v2.functional")
