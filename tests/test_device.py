"""Laws of the device and the thread count: what was asked for, else all there is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fastbyol.config import ConfigError
from fastbyol.device import choose, use_all_cores


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_core_of_the_process_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    use_all_cores()
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_the_users_own_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    use_all_cores()
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_and_the_cpu_is_the_default() -> None:
    assert choose(None) == choose("cpu") == "cpu"
    with pytest.raises(ConfigError, match="give --device cpu"):
        choose("cuda")


def test_idle_threads_spin_briefly_unless_the_user_chose() -> None:
    code = "import os, sys, fastbyol; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for chosen, expected in (({}, "100000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        environment = {**plain, **chosen}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert said.stdout == f"{expected}\n"
