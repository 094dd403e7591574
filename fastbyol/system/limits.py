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


FILES = {  # of limit, usage and droppable cache, by version of the control groups
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> int:
    """Return the bytes that the kernel reports as available, or that a control group leaves, if fewer."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    machine = int(lines["MemAvailable"].split()[0]) * 1024
    return max(min((machine, *_group_bytes_left())), 0)


def _group_bytes_left() -> Iterator[int]:
    """Yield limit less usage of every memory group of the process, such as a scheduler's or a container's."""
    for group, version in groups("memory"):
        names = FILES[version]
        if (group / names[0]).exists():
            yield from _bytes_left(group, *names)


def _bytes_left(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Yield what one group leaves; nothing where it sets no limit. Cached files, which can be dropped, do not count."""
    text = (group / limit).read_text().strip()
    if text != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield int(text) - int((group / usage).read_text()) + int(stat[cache])
