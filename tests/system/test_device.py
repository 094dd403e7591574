"""Laws of the device and of idle threads: what was asked for, else the best there is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch

from fastbyol.errors import ConfigError
from fastbyol.system.device import STEPS_AHEAD, Throttle, choose_device, queue_copy


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
    throttle = Throttle("cpu")
    throttle.before_step()
    throttle.after_step()
    assert throttle.take_idle() is None


@dataclass
class Gpu:
    """A simulated host with a GPU: the clock of the one, and until when the other has work."""

    now_s: float = 0.0
    busy_until_s: float = 0.0

    def compute(self, seconds: float) -> None:
        self.busy_until_s = max(self.now_s, self.busy_until_s) + seconds

    def new_event(self) -> Event:
        return Event(self)


@dataclass
class Event:
    """An event of that GPU, with torch's methods."""

    gpu: Gpu
    at_s: float = field(default=0.0)

    def record(self) -> None:
        self.at_s = max(self.gpu.now_s, self.gpu.busy_until_s)

    def synchronize(self) -> None:
        self.gpu.now_s = max(self.gpu.now_s, self.at_s)

    def elapsed_time(self, later: Event) -> float:
        assert self.gpu.now_s >= later.at_s, "torch raises where an event has not happened yet"
        return 1000 * (later.at_s - self.at_s)


@pytest.mark.parametrize(("wait_s", "step_s", "idle_s"), [(0.05, 0.01, 0.04), (0.01, 0.05, 0.0)])
def test_the_gpu_idles_only_while_it_has_nothing_left_to_do(wait_s: float, step_s: float, idle_s: float) -> None:
    gpu = Gpu()
    throttle = Throttle("cuda", new_event=gpu.new_event)
    for number in range(12):
        gpu.now_s += wait_s
        if number == 6:
            gpu.now_s += 100
            throttle.pause()
        throttle.before_step(wait_s=0.003 if number == 3 else wait_s)
        gpu.compute(step_s)
        throttle.after_step()
    counted = 12 - 1 - 1 - STEPS_AHEAD  # without the first, the one after the pause and the last
    idle, again = throttle.take_idle(), throttle.take_idle()
    assert idle is not None
    assert idle.idle_s == pytest.approx(counted * idle_s)
    assert idle.waiting_s == pytest.approx((counted - 1) * min(idle_s, wait_s) + min(idle_s, 0.003))
    assert again == (0.0, 0.0)
