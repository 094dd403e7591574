"""Laws of --wandb where the package is missing or cannot start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.config import ConfigError
from fastbyol.wandb_run import check_installed


def test_a_missing_package_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"--wandb needs the package no_such_wandb; pip install 'fastbyol\[wandb\]'"):
        check_installed("no_such_wandb")
    check_installed("json")


def test_wandb_is_not_imported_before_it_is_asked_for() -> None:
    probe = "import sys, fastbyol.wandb_run as w; w.check_installed('json'); assert 'wandb' not in sys.modules"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", probe], check=False, cwd=root).returncode == 0
