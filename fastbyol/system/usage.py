"""CPU time, page faults and disk waits of this process and its machine, as the kernel counts them (Linux)."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """Counters of this process and the machine: seconds and counts that only grow.

    cpu_s: of this process; machine_cpu_s: of all processes on all cores; major_faults: pages that this process waited
    for a disk to load; stalled_s: time in which some task waited for a disk, 0 where the kernel does not count it.
    """

    at_s: float
    cpu_s: float
    machine_cpu_s: float
    major_faults: int
    stalled_s: float


def usage() -> Usage:
    """Read the counters of this process and machine (Linux)."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    busy = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = busy
    return Usage(
        at_s=time.monotonic(),
        cpu_s=own.ru_utime + own.ru_stime,
        machine_cpu_s=(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
        major_faults=own.ru_majflt,
        stalled_s=_stalled_s(),
    )


def _stalled_s() -> float:
    try:
        some = Path("/proc/pressure/io").read_text().split("\n", 1)[0]
    except OSError:  # a kernel without pressure accounting, or one that forbids reading it
        return 0.0
    return int(some.rpartition("total=")[2]) / 1e6
