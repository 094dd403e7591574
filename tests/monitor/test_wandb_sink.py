"""Laws of --wandb where the package is missing or cannot start."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastbyol.errors import ConfigError
from fastbyol.monitor.wandb_sink import require_wandb, run_id
from tests.support.commands import PATIENCE_S


def test_a_missing_package_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"--wandb needs the package no_such_wandb; pip install 'fastbyol\[wandb\]'"):
        require_wandb("no_such_wandb")
    require_wandb("json")


def test_wandb_is_not_imported_before_it_is_asked_for() -> None:
    probe = "import sys, fastbyol.monitor.wandb_sink as w; w.require_wandb('json'); assert 'wandb' not in sys.modules"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", probe], check=False, cwd=root).returncode == 0


def test_a_folders_run_keeps_its_id_and_folders_of_one_name_have_two(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (one, other):
        folder.mkdir(parents=True)
    first = run_id(one, is_new=True)
    assert run_id(one, is_new=False) == first
    assert run_id(other, is_new=True) != first
    assert run_id(one, is_new=True) != first  # a run that overwrites another is not that run
    (one / "wandb-id").write_text("")
    assert len(run_id(one, is_new=False)) == len(first)


STUCK = """
import threading
__version__ = "0"
class Error(Exception): pass
class Settings:
    model_fields = {"finish_timeout": None}
    def __init__(self, **settings): pass
class Run:
    def define_metric(self, *names, **settings): pass
    def finish(self): threading.Event().wait()
def init(**settings): return Run()
"""
USE = """
import sys
from pathlib import Path
from fastbyol.monitor import wandb_sink
wandb_sink.FINISH_S = 1.0
wandb_sink.WandbRun("project", folder=Path(sys.argv[1]), name="a-run", settings={}, is_new=True).close()
"""


def test_a_wandb_that_never_finishes_does_not_keep_the_run_from_ending(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(STUCK)
    root, began = Path(__file__).parents[2], time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{root}:{tmp_path}", "PATH": ""},
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 0, ran.stderr
    assert "wandb did not finish (it took more than 1 s); metrics.jsonl holds every row" in ran.stderr
    assert time.monotonic() - began >= 1.0
