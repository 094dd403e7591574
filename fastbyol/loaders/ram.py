"""RAM that is available to this process, with the limits of its control groups (Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastbyol.cgroups import groups

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
