"""The finished run that several tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.cli.train import main
from tests.conftest import Betons
from tests.support.runs import arguments


@pytest.fixture(scope="session")
def finished(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three epochs without interruption."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(betons, out, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")) == 0
    return out
