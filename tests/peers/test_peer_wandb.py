"""Laws of W&B as a place for rows, by the package itself, offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastbyol.errors import ConfigError
from fastbyol.monitor.logger import Telemetry
from fastbyol.monitor.metrics import read_metrics
from fastbyol.monitor.wandb_sink import WandbRun
from tests.monitor.test_metrics import row
from tests.support.commands import PATIENCE_S

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def log_rows(folder: Path, steps: range) -> None:
    """Write rows of distinctive losses to metrics.jsonl and W&B, each time to a folder of its own.

    wandb names its folders by the second, and two runs of one second would share theirs.
    """
    own = folder / f"from-{steps.start}"
    own.mkdir()
    if (folder / "wandb-id").exists():
        shutil.copy(folder / "wandb-id", own)
    is_new = steps.start == 1
    run = WandbRun("fastbyol-tests", folder=own, name="a-run", settings={"batch_size": 64}, is_new=is_new)
    shutil.copy(own / "wandb-id", folder)
    with Telemetry(folder / "metrics.jsonl", from_step=steps.start - 1, extra_sink=run) as telemetry:
        for step in steps:
            telemetry.write_row(row(step, loss=step + 0.123456, warnings=["not a number"]), left_s=1.0)


def sent(folder: Path) -> list[float]:
    """Read the losses off wandb's transaction logs, which hold values as JSON text."""
    own_id = (folder / "wandb-id").read_text().strip()
    data = b"".join(path.read_bytes() for path in folder.rglob(f"run-{own_id}.wandb"))
    return sorted({float(value) for value in re.findall(rb"(\d+\.123456)\D", data)})


def all_are_sent(folder: Path) -> bool:
    """Wait until wandb's own process, which writes after finish() has returned, has written every row."""
    wanted = [r["loss"] for r in read_metrics(folder / "metrics.jsonl")]
    deadline = time.monotonic() + 20
    while sent(folder) != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return sent(folder) == wanted


def test_every_row_reaches_wandb_also_after_a_resume(tmp_path: Path) -> None:
    log_rows(tmp_path, range(1, 5))
    assert all_are_sent(tmp_path)
    log_rows(tmp_path, range(3, 7))
    assert all_are_sent(tmp_path)


def test_a_project_wandb_refuses_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wandb does not start"):
        WandbRun("no/such:project", folder=tmp_path, name="a-run", settings={}, is_new=True)


START = """
import sys
import time
from pathlib import Path
from fastbyol.errors import ConfigError
from fastbyol.monitor.wandb_sink import WandbRun
try:
    WandbRun("project", folder=Path(sys.argv[1]), name="a-run", settings={}, is_new=True)
except ConfigError as error:
    print(error)
"""


def test_no_login_is_one_clear_line(tmp_path: Path) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    ran = subprocess.run(  # a process of its own: wandb remembers the mode of its first run
        [sys.executable, "-c", START, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=kept | nowhere,
        timeout=PATIENCE_S,
    )
    assert "wandb does not start" in ran.stdout, ran.stderr
    assert "WANDB_MODE=offline" in ran.stdout
