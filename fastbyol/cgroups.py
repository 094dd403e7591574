"""Know which control groups hold this process back: its own and all above it, of version 2 or 1 (Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def groups(controller: str, *, root: Path = ROOT, own: Path = OWN) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each group that a controller, such as "memory", may limit, and 1 or 2, its version.

    root: where the groups are mounted; own: the file that says which the process is in. Nothing where there is none.
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
