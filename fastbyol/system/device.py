"""Device choice, copies between host and GPU that do not block, and a limit on how far the host runs ahead."""

from __future__ import annotations

import os
from collections import deque

import torch
from torch import Tensor
from torch.utils import deterministic

from fastbyol.errors import ConfigError


def choose_device(requested: str | None) -> str:
    """Return "cuda" or "cpu": the requested one, else the GPU if there is one; raise ConfigError if it is missing."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no GPU; give --device cpu, or install a CUDA build of torch")
    return requested or ("cuda" if torch.cuda.is_available() else "cpu")


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


class Throttle:
    """A limit on the host: it queues at most `steps_ahead` steps before the GPU.

    Without the limit the host would queue minutes of work, and miss a deadline read from its clock by as much.
    """

    def __init__(self, device: str, *, steps_ahead: int = STEPS_AHEAD) -> None:
        self._on_gpu = device == "cuda"
        self._steps_ahead = steps_ahead
        self._ends: deque[torch.cuda.Event] = deque()

    def after_step(self) -> None:
        """Record the step just queued; wait for the step `steps_ahead` before it, not for this one."""
        if not self._on_gpu:
            return
        end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the wait sleeps, which leaves the core to decoding
        end.record()
        self._ends.append(end)
        if len(self._ends) > self._steps_ahead:
            self._ends.popleft().synchronize()
