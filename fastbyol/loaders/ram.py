"""Know how much RAM this process may still take, on a machine of its own or in a share of one (Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastbyol.cgroups import groups

NAMES = {  # of limit, use and droppable cache, by version
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> int:
    """Return what the kernel calls available, or what a control group above the process leaves, if that is less."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    machine = int(lines["MemAvailable"].split()[0]) * 1024
    return max(min((machine, *_left_by_groups())), 0)


def _left_by_groups() -> Iterator[int]:
    """Yield limit less use of every memory group the process is in, as a scheduler or a container sets them."""
    for group, version in groups("memory"):
        names = NAMES[version]
        if (group / names[0]).exists():
            yield from _left_by(group, *names)


def _left_by(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Yield what one group leaves; nothing where it sets no limit. Cached files can be dropped and do not count."""
    text = (group / limit).read_text().strip()
    if text != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield int(text) - int((group / usage).read_text()) + int(stat[cache])
