"""Know when training starves for data, and why: saturated cores, a slow disk, or too few decoding threads."""

from __future__ import annotations

import os
import resource
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbyol.cgroups import available_cores

WARN_SHARE = 0.1  # of the loop's time spent waiting
ROWS = 5  # rows of metrics.jsonl that are judged together
SATURATED = 0.9  # of the cores' time
OTHERS = 0.5  # of the cores' busy time, used by other processes
FAULTS_PER_IMAGE = 0.25  # a JPEG read from disk faults once or more; one in the page cache never
STALLED = 0.2  # of the time some task of the machine waited for a disk, as the kernel tells it


@dataclass(frozen=True)
class Usage:
    """Hold what the machine has done since it, or this process, began: seconds and counts that only grow.

    cpu_s: of this process; machine_cpu_s: of all, on all cores; major_faults: pages this process waited for a disk to
    bring; stalled_s: time in which some task waited for a disk, 0 where the kernel does not tell.
    """

    at_s: float
    cpu_s: float
    machine_cpu_s: float
    major_faults: int
    stalled_s: float


@dataclass(frozen=True)
class Utilization:
    """Describe a stretch of training: shares in [0, 1] of its time, or of its cores' time, and faults per image."""

    waiting: float
    cores_busy: float
    cores_busy_by_us: float
    stalled: float
    faults_per_image: float


def usage() -> Usage:
    """Read the counters of this process and machine (Linux)."""
    ours = resource.getrusage(resource.RUSAGE_SELF)
    busy = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = busy
    return Usage(
        at_s=time.monotonic(),
        cpu_s=ours.ru_utime + ours.ru_stime,
        machine_cpu_s=(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
        major_faults=ours.ru_majflt,
        stalled_s=_stalled_s(),
    )


def _stalled_s() -> float:
    try:
        some = Path("/proc/pressure/io").read_text().split("\n", 1)[0]
    except OSError:  # a kernel without pressure accounting, or one that forbids reading it
        return 0.0
    return int(some.rpartition("total=")[2]) / 1e6


def utilization(before: Usage, after: Usage, *, wait_s: float, loop_s: float, images: float, cores: int) -> Utilization:
    """Relate what happened between two readings to the time, cores and images between them."""
    span_s = max(after.at_s - before.at_s, 1e-9)
    machine = os.cpu_count() or cores
    by_us = (after.cpu_s - before.cpu_s) / (span_s * cores)
    by_all = (after.machine_cpu_s - before.machine_cpu_s) / (span_s * machine)
    return Utilization(
        waiting=min(wait_s / max(loop_s, 1e-9), 1.0),
        cores_busy=min(max(by_us, by_all), 1.0),
        cores_busy_by_us=min(by_us, 1.0),
        stalled=min((after.stalled_s - before.stalled_s) / span_s, 1.0),
        faults_per_image=(after.major_faults - before.major_faults) / max(images, 1.0),
    )


def utilization_over(readings: Sequence[tuple[Usage, dict[str, float]]], *, cores: int, ranks: int) -> Utilization:
    """Relate the first reading to the last, by the rows of all but the first, which ended a stretch before it.

    ranks: how many processes load the images of a row; a reading is of one of them.
    """
    rows = [row for _, row in readings[1:]]
    return utilization(
        readings[0][0],
        readings[-1][0],
        wait_s=sum(row["loader_wait_s"] for row in rows),
        loop_s=sum(row["interval_s"] for row in rows),
        images=sum(row["images_per_s"] * row["interval_s"] for row in rows) / ranks,
        cores=cores,
    )


def advice(seen: Utilization, *, threads: int | None, cores: int, loader: str) -> str | None:
    """Say in one line how much time is lost and the likely cause with its remedy; None where little is lost.

    threads: how many decode, None where more would not help; loader: the one in use, of config.LOADERS.
    """
    if seen.waiting <= WARN_SHARE:
        return None
    lost = f"{100 * seen.waiting:.0f} % of the training time is lost waiting for images"
    memory = "" if loader == "memory" else "give --loader memory, or "
    if seen.cores_busy < SATURATED and (seen.faults_per_image >= FAULTS_PER_IMAGE or seen.stalled >= STALLED):
        return f"{lost}; the disk is the likely cause: {memory}copy the file to a local disk"
    if seen.cores_busy >= SATURATED and seen.cores_busy_by_us < OTHERS * seen.cores_busy:
        return f"{lost}; other processes hold the {cores} cores"
    if seen.cores_busy >= SATURATED:
        return (
            f"{lost}; decoding fills the {cores} cores: {memory}write the file with a smaller --max-side, or ask for "
            "more cores"
        )
    if threads is not None and threads < cores:
        return f"{lost}, while cores are idle: give --workers {cores}"
    return f"{lost}, though neither cores nor disk are busy: {memory}give a larger --prefetch"


class StarvationMonitor:
    """Look at the rows of a run and say, once, that it starves; threads and loader as advice takes them.

    local_ranks: the processes of the run that share this machine's cores; ranks: those that share a row's images.
    """

    def __init__(self, *, threads: int | None, loader: str, local_ranks: int = 1, ranks: int = 1) -> None:
        self._threads, self._loader, self._ranks = threads, loader, ranks
        self.cores = max(available_cores() // local_ranks, 1)
        self._seen: deque[tuple[Usage, dict[str, float]]] = deque(maxlen=ROWS + 1)
        self._said = False

    def update(self, row: dict[str, float]) -> str | None:
        """Take a row in; return the warning when the last ROWS of them call for it, the first time they do.

        The rows before the first reading, in which the loader fills its queue, never count. Readings begin anew with a
        row whose score took time of its own.
        """
        if self._said:
            return None
        if "score_s" in row:
            self._seen.clear()
        self._seen.append((usage(), row))
        if len(self._seen) <= ROWS:
            return None
        seen = utilization_over(list(self._seen), cores=self.cores, ranks=self._ranks)
        said = advice(seen, threads=self._threads, cores=self.cores, loader=self._loader)
        self._said = said is not None
        return said
