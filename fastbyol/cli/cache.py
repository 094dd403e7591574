"""Images given on a command line: a .beton as it is, anything else converted once, into a cache, by fastbyol-prep."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbyol.beton import BetonError, Reader, is_beton
from fastbyol.errors import ConfigError
from fastbyol.system.command_line import ANY_SOURCE

PREP = (sys.executable, "-m", "fastbyol.data_prep.cli")
SILENT_S = 2.0  # a conversion that takes longer is said to run
NAME_LENGTH = 40  # of a source, in the name of its .beton


@dataclass(frozen=True)
class Cache:
    """Converted sources: a folder of .beton files, each named after its source and the flags it was written with.

    flags: of fastbyol-prep write; command: the name that errors begin with; left_s: seconds after which a conversion is
    given up, None for no limit.
    """

    folder: Path
    flags: tuple[str, ...] = ()
    command: str = "fastbyol-train"
    left_s: float | None = None

    def pair(self, train: str, val: str) -> tuple[str, str]:
        """Return the .beton of each of two sources, the classes of the second numbered as in the first."""
        first = self.beton(train)
        return first, first if val == train else self.beton(val, like=first)

    def beton(self, source: str, *, like: str | None = None) -> str:
        """Return the path of a source's .beton, written anew only where the source or the flags have changed.

        A .beton is returned as it is. like: another .beton, whose classes are to have the same numbers here. Several
        processes may ask at once. Raises ConfigError where the source cannot be converted; fastbyol-prep has then
        printed why.
        """
        path = Path(source)
        if not source:
            raise ConfigError(f"an empty path is given for images; give {ANY_SOURCE}")
        if path.suffix == ".beton" or is_beton(path):
            return source
        flags = [*self.flags, *([] if like is None else self._same_classes(like))]
        out = self.folder / _name(source, flags)
        self.folder.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".lock").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # another rank, or another run, may be writing it
            self._write([*PREP, "write", source, str(out), "--reuse", *flags], source)
        return str(out)

    def _write(self, command: list[str], source: str) -> None:
        """Run fastbyol-prep, and end it with this process's interruption or time."""
        left_s = math.inf if self.left_s is None else max(self.left_s, 0.0)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            said = _wait(process, min(left_s, SILENT_S))
            if said is None and left_s > SILENT_S:
                print(f"{self.command}: {source} is converted, once, to {self.folder}", file=sys.stderr)
                said = _wait(process, left_s - SILENT_S)
            if said is None:
                raise ConfigError(
                    f"{source} could not be converted within the budget; give a longer --budget, or a file that "
                    "fastbyol-prep write has written before"
                )
        finally:
            if process.poll() is None:
                process.terminate()  # it removes what is unfinished
                process.wait()
        for line in said.splitlines():
            print(f"{self.command}: {line}", file=sys.stderr)
        if process.returncode:
            raise ConfigError(
                f"{source} cannot be used, as said above; give {ANY_SOURCE}, with its flags in --prep, as in "
                "--prep '--labels none'"
            )

    def _same_classes(self, beton: str) -> list[str]:
        """Return the flag that numbers classes as another .beton does, if that has classes and they are wanted."""
        if {"none", "--labels=none"}.intersection(self.flags):
            return []
        try:
            with Reader(beton) as reader:
                return [] if reader.class_names is None else [f"--classes-from={beton}"]
        except BetonError:  # the run will say what is wrong with it
            return []


def _wait(process: subprocess.Popen[str], seconds: float) -> str | None:
    """Return what a process has printed when it ends; None if it still runs after so many seconds."""
    try:
        return process.communicate(timeout=None if seconds == math.inf else seconds)[0]
    except subprocess.TimeoutExpired:
        return None


def _name(source: str, flags: Sequence[str]) -> str:
    """Name the .beton of a source after it, and after a digest of its path and the flags."""
    key = os.fsencode("\0".join([os.path.abspath(source), *flags]))  # noqa: PTH100 - a pattern need not be a path
    name = re.sub(r"[^\w.-]+", "-", Path(source).name)[:NAME_LENGTH].strip("-") or "images"
    return f"{name}-{hashlib.blake2b(key, digest_size=4).hexdigest()}.beton"
