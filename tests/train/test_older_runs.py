"""Runs that an older version of fastbyol began go on: run_of_0.1 was stopped by a signal on its way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastbyol import train
from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons

STOPPED = Path(__file__).parent / "run_of_0.1"


def test_a_run_of_0_1_is_resumed_to_its_end(betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # its configuration names train.beton and val.beton
    shutil.copy(betons.train, "train.beton")
    shutil.copy(betons.val, "val.beton")
    folder = RunFolder(Path(shutil.copytree(STOPPED, "run")))
    before = read_metrics(folder.metrics)
    result = train.run(folder.read_config(), folder.path, resume=True)
    rows = read_metrics(folder.metrics)
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert result is not None
    assert result["steps"] == 20
