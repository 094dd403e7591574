"""Know where a process of ours computes, and keep the host's clock near the GPU's."""

from __future__ import annotations

import os
from collections import deque

import torch
from torch import Tensor
from torch.utils import deterministic

from fastbyol.config import ConfigError


def choose_device(asked: str | None) -> str:
    """Return "cuda" or "cpu": what was asked for, else the GPU if there is one; raise ConfigError if it is missing."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no GPU; give --device cpu, or install a CUDA build of torch")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def queue_copy(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return the tensor on the device; the copy is queued from pinned memory, and the host does not wait for it."""
    if device == "cpu" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def make_deterministic() -> None:
    """Let torch choose algorithms that give the same bits every time, for this process from here on.

    What has no such form warns. cuBLAS reads its setting when it is first used, so call this before that.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # the kernels write all that they allocate


class HostCopy:
    """Hold numbers on their way from a device: the copy is queued, and `read` waits for it and for nothing after it."""

    def __init__(self, numbers: Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=numbers.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[float]:
        """Give the numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.tolist()
        return values


STEPS_AHEAD = 2  # steps


class Throttle:
    """Hold the host at most `steps_ahead` steps before the GPU: it stays ahead, and its clock stays the GPU's.

    Without it the host would queue minutes of work, and a deadline read from its clock would be missed by as much.
    """

    def __init__(self, device: str, *, steps_ahead: int = STEPS_AHEAD) -> None:
        self._on_gpu = device == "cuda"
        self._steps_ahead = steps_ahead
        self._ends: deque[torch.cuda.Event] = deque()

    def after_step(self) -> None:
        """Take note of a step just queued; wait for the one `steps_ahead` before it, not for this one."""
        if not self._on_gpu:
            return
        end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # sleeping, it leaves the core to decoding
        end.record()
        self._ends.append(end)
        if len(self._ends) > self._steps_ahead:
            self._ends.popleft().synchronize()
