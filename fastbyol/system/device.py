"""Device choice, copies between host and GPU that do not block, and a limit on how far the host runs ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

from fastbyol.errors import ConfigError


def choose_device(requested: str | None) -> str:
    """Return "cuda" or "cpu": the requested one, else the GPU if there is one; raise ConfigError if it is missing."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no GPU; give --device cpu, or install a CUDA build of torch")
    return requested or ("cuda" if torch.cuda.is_available() else "cpu")


def default_precision(device: str) -> str:
    """Return "bfloat16" where a device multiplies such numbers faster than float32: GPUs, CPUs with AVX512-BF16 or AMX.

    A CPU is asked through the kernel (Linux); elsewhere it is taken to lack them.
    """
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if device == "cpu" and cpuinfo.exists() else set()
    return "bfloat16" if device == "cuda" or words & {"avx512_bf16", "amx_bf16"} else "float32"


def queue_copy(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return the tensor on the device; a copy to a GPU is queued from pinned memory, and the host does not wait."""
    if device == "cpu" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def make_deterministic() -> None:
    """Make torch use deterministic algorithms in this process from here on; operations without one warn.

    Call it before cuBLAS is first used, which is when cuBLAS reads its setting.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # the kernels write all that they allocate


class HostCopy:
    """A queued copy of numbers from a device to the host; `read` waits for that copy and for nothing after it."""

    def __init__(self, numbers: Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=numbers.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[float]:
        """Wait for the copy and return the numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.tolist()
        return values


STEPS_AHEAD = 2  # of the host, before the GPU


class Idle(NamedTuple):
    """Seconds that a GPU idled between steps, and those of them in which the host waited for images."""

    idle_s: float = 0.0
    waiting_s: float = 0.0


class Throttle:
    """A limit on the host, which queues at most `steps_ahead` steps before the GPU; and what the GPU idles meanwhile.

    Without the limit the host would queue minutes of work, and miss a deadline read from its clock by as much. The host
    waits for images while the GPU computes: no time is lost before the GPU has nothing left to do. new_event: makes an
    event that takes its time on the GPU.
    """

    def __init__(
        self, device: str, *, steps_ahead: int = STEPS_AHEAD, new_event: Callable[[], Any] | None = None
    ) -> None:
        self._on_gpu = device == "cuda" or new_event is not None
        self._steps_ahead = steps_ahead
        # blocking: a wait sleeps, which leaves the core to decoding
        self._new_event = new_event or partial(torch.cuda.Event, blocking=True, enable_timing=True)
        self._steps: deque[tuple[Any, float, Any]] = deque()  # start, None after a pause, the wait before it, end
        self._start: Any = None
        self._wait_s = 0.0
        self._last_end: Any = None
        self._is_after_pause = True
        self._idle = Idle()

    def before_step(self, *, wait_s: float = 0.0) -> None:
        """Note that the step's work is queued from here on; wait_s: what the host has just waited for images."""
        if self._on_gpu and not self._is_after_pause:
            self._start, self._wait_s = self._record(), wait_s
        self._is_after_pause = False

    def after_step(self) -> None:
        """Note that the step's work is queued; wait for the step `steps_ahead` before it, not for this one."""
        if not self._on_gpu:
            return
        self._steps.append((self._start, self._wait_s, self._record()))
        self._start = None
        if len(self._steps) > self._steps_ahead:
            start, wait_s, end = self._steps.popleft()
            end.synchronize()
            if start is not None and self._last_end is not None:
                idle_s = self._last_end.elapsed_time(start) / 1000
                self._idle = Idle(self._idle.idle_s + idle_s, self._idle.waiting_s + min(idle_s, wait_s))
            self._last_end = end

    def pause(self) -> None:
        """Leave what the GPU idles until the next step out of the count."""
        self._is_after_pause = True

    def take_idle(self) -> Idle | None:
        """Return and reset what the GPU idled between the steps that have ended; None without a GPU."""
        idle, self._idle = self._idle, Idle()
        return idle if self._on_gpu else None

    def _record(self) -> Any:
        event = self._new_event()
        event.record()
        return event
