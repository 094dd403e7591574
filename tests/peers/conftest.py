"""Imports of the peers that tests compare with; a test is skipped where its peer is missing."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.support.peers import import_torchvision


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """Import torchvision beside a torch its compiled operations were not built for: those are left out."""
    try:
        return import_torchvision()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def functional(torchvision: ModuleType) -> ModuleType:  # noqa: ARG001
    """Name torchvision's transforms as functions."""
    return pytest.importorskip("torchvision.transforms.v2.functional")
