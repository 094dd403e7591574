"""Detection of data starvation and its likely cause: saturated cores, a slow disk, or too few decoding threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fastbyol.system.limits import available_cores
from fastbyol.system.usage import Usage, usage

WARN_FRACTION = 0.1  # of the loop's time spent waiting
ROWS = 5  # of metrics.jsonl, over which utilization is measured
SATURATED = 0.9  # of the cores' time
OTHERS = 0.5  # of the cores' busy time, used by other processes
FAULTS_PER_IMAGE = 0.25  # a JPEG read from disk causes one page fault or more, one in the page cache none
STALLED = 0.2  # of the time, in which the kernel counts some task of the machine as waiting for a disk


@dataclass(frozen=True)
class Utilization:
    """Utilization over a stretch of training: fractions in [0, 1] of its time or its cores' time; faults per image."""

    waiting: float
    cores_busy: float
    cores_busy_by_us: float
    stalled: float
    faults_per_image: float


def utilization(before: Usage, after: Usage, *, wait_s: float, loop_s: float, images: float, cores: int) -> Utilization:
    """Compute utilization between two readings, from the time, cores and images between them."""
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
    """Compute utilization from the first reading to the last; the first row ends where the stretch begins.

    ranks: the number of processes that load the images of a row; a reading is of one of them.
    """
    rows = [row for _, row in readings[1:]]
    return utilization(
        readings[0][0],
        readings[-1][0],
        wait_s=sum(row["loader_wait_share"] * row["interval_s"] for row in rows),
        loop_s=sum(row["interval_s"] for row in rows),
        images=sum(row["images_per_s"] * row["interval_s"] for row in rows) / ranks,
        cores=cores,
    )


def advice(seen: Utilization, *, threads: int | None, cores: int, loader: str) -> str | None:
    """Return a line with the time lost, its likely cause and the remedy; None where little is lost.

    threads: the number that decode, None where more would not help; loader: the one in use, of registry.LOADERS.
    """
    if seen.waiting <= WARN_FRACTION:
        return None
    lost = f"{100 * seen.waiting:.0f} % of the training time is lost waiting for images"
    memory = "" if loader == "memory" else "give --loader memory, or "
    if seen.cores_busy < SATURATED and (seen.faults_per_image >= FAULTS_PER_IMAGE or seen.stalled >= STALLED):
        return f"{lost}; the disk is the likely cause: {memory}copy the file to a local disk"
    if seen.cores_busy >= SATURATED and seen.cores_busy_by_us < OTHERS * seen.cores_busy:
        return f"{lost}; other processes use the {cores} cores: stop them, or run on an idle machine"
    if seen.cores_busy >= SATURATED:
        return (
            f"{lost}; decoding fills the {cores} cores: {memory}write the file with a smaller --max-side, or ask for "
            "more cores"
        )
    if threads is not None and threads < cores:
        return f"{lost}, while cores are idle: give --workers {cores}"
    return f"{lost}, though neither the cores nor the disk are busy: {memory}give a larger --prefetch"


class StarvationMonitor:
    """A monitor of the rows of a run, which warns once when training waits for data.

    threads, loader: as in advice(); local_ranks: the processes of the run on this machine's cores; ranks: the processes
    that load a row's images.
    """

    def __init__(self, *, threads: int | None, loader: str, local_ranks: int = 1, ranks: int = 1) -> None:
        self._threads, self._loader, self._ranks = threads, loader, ranks
        self.cores = max(available_cores() // local_ranks, 1)
        self._seen: deque[tuple[Usage, dict[str, float]]] = deque(maxlen=ROWS + 1)
        self._has_warned = False

    def update(self, row: dict[str, float]) -> str | None:
        """Add a row; return a warning the first time the last ROWS rows call for one.

        The first row is not counted, because the loader fills its queue in it. A row with a score, which took time
        outside the loop, starts the readings anew.
        """
        if self._has_warned:
            return None
        if "score_s" in row:
            self._seen.clear()
        self._seen.append((usage(), row))
        if len(self._seen) <= ROWS:
            return None
        seen = utilization_over(list(self._seen), cores=self.cores, ranks=self._ranks)
        warning = advice(seen, threads=self._threads, cores=self.cores, loader=self._loader)
        self._has_warned = warning is not None
        return warning
