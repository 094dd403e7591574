"""Control groups of this process, version 1 or 2, and the cores they allow it (Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def groups(controller: str, *, root: Path = ROOT, own: Path = OWN) -> Iterator[tuple[Path, int]]:
    """Yield the folder and the version, 1 or 2, of each group in which a controller, such as "memory", may set a limit.

    root: where the groups are mounted; own: the file that lists the groups of the process. Yields nothing without it.
    """
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, version = root, 2
        elif controller in controllers.split(","):
            top, version = root / controller, 1
        else:
            continue
        innermost = top / path.lstrip("/")
        for group in (innermost, *innermost.parents):
            if group.is_relative_to(top):
                yield group, version


def available_cores() -> int:
    """Count the cores this process may use: its affinity, or fewer where a control group limits its CPU time."""
    cores = len(os.sched_getaffinity(0))
    quotas = (quota for group, version in groups("cpu") for quota in core_quotas(group, version=version))
    return min((cores, *(max(round(quota), 1) for quota in quotas)))


def core_quotas(group: Path, *, version: int) -> Iterator[float]:
    """Yield the CPU time a control group allows, in cores; nothing where it sets no limit."""
    files = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}[version]
    try:
        quota, period = " ".join((group / name).read_text() for name in files).split()
    except OSError:  # the root has no such file
        return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)
