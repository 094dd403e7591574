"""Laws of the device and of idle threads: what was asked for, else the best there is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastbyol.errors import ConfigError
from fastbyol.system.device import Throttle, choose_device, queue_copy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_and_the_cpu_is_the_default() -> None:
    assert choose_device(None) == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="give --device cpu"):
        choose_device("cuda")


def test_idle_threads_spin_briefly_unless_the_user_chose() -> None:
    code = "import os, sys, fastbyol; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for chosen, expected in (({}, "100000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        environment = {**plain, **chosen}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert said.stdout == f"{expected}\n"


def test_on_a_cpu_a_copy_is_the_tensor_and_the_pace_is_free() -> None:
    tensor = torch.zeros(3)
    assert queue_copy(tensor, "cpu") is tensor
    Throttle("cpu").after_step()
