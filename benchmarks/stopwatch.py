"""The timing of one run: on the device by events, on the host by the clock and by the CPU time it took."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FLUSH_BYTES = 2**29  # nine times the L2 of an H200
HEAD_START_CYCLES = 20_000_000  # 10 ms at 2 GHz, in which the host issues launches: what is meant is the device's time
COPY_BYTES = 2**31
WARM_UPS = {"cuda": 3, "cpu": 1}


class Taken(NamedTuple):
    """Milliseconds of one run: on the device, until the host could go on, and of CPU time."""

    taken_ms: float
    host_ms: float
    cpu_ms: float


class Stopwatch:
    """A timer of runs on a device; on a GPU by events, with the caches filled by something else."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self._flush = torch.ones(FLUSH_BYTES // 4, device=device)
            self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[], object]) -> Taken:
        """Run once and return the times."""
        if self.device == "cpu":
            since, began = CpuClock(), time.perf_counter()
            run()
            taken_ms = 1000 * (time.perf_counter() - began)
            return Taken(taken_ms, taken_ms, 1000 * since.elapsed_s())
        torch.cuda.synchronize()
        self._flush.sum()  # read, not written: a dirty cache would be written back inside the timed part
        since = CpuClock()  # takes milliseconds in a process of many threads: outside the head start
        torch.cuda._sleep(HEAD_START_CYCLES)
        self._began.record()
        began = time.perf_counter()
        run()
        host_ms = 1000 * (time.perf_counter() - began)
        self._ended.record()
        cpu_ms = 1000 * since.elapsed_s()
        self._ended.synchronize()
        return Taken(self._began.elapsed_time(self._ended), host_ms, cpu_ms)

    def copy_gb_per_s(self) -> float | None:
        """Measure the GPU's bandwidth in a plain copy, bytes read plus bytes written; None on a CPU."""
        if self.device == "cpu":
            return None  # what is timed on a CPU fits its caches, and would not compare
        source = torch.ones(COPY_BYTES // 4, device=self.device)
        target = torch.empty_like(source)
        for _ in range(WARM_UPS[self.device]):
            target.copy_(source)
        taken = [self(lambda: target.copy_(source)).taken_ms for _ in range(10)]
        return 2 * COPY_BYTES / float(np.median(taken)) / 1e6


class CpuClock:
    """A clock of the CPU time of this process with all its threads, and of its children, ended or running.

    Its own reading of the children's time, which takes milliseconds, is not counted.
    """

    def __init__(self) -> None:
        self._children_s = _of_children_s()
        self._own_s = time.process_time()

    def elapsed_s(self) -> float:
        """Return the CPU seconds since the clock was made."""
        own_s = time.process_time() - self._own_s
        return own_s + _of_children_s() - self._children_s


def _of_children_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + sum(map(_of_child_s, _running_children()))


def _running_children() -> Iterator[str]:
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread ended just now
            yield from file.read_text().split()


def _of_child_s(pid: str) -> float:
    """Read user and system time, which proc(5) gives in ticks of 10 ms."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # it ended just now
        return 0.0
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")
