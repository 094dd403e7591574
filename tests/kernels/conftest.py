"""Run the kernel tests where Triton runs: on a GPU, or under its interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch

from fastbyol.kernels.dispatch import runs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    """Name the device the kernels run on."""
    return DEVICE


@pytest.fixture(autouse=True)
def _triton_runs() -> None:
    if not runs_triton(torch.empty(0, device=DEVICE)):
        pytest.skip("no GPU and no TRITON_INTERPRET=1: `make test` runs these in a second process")
