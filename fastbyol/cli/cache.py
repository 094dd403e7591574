"""Images given on a command line: a .beton as it is, anything else converted once, into a cache, by fastbyol-prep."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from fastbyol.beton import BetonError, Reader, is_beton
from fastbyol.errors import ConfigError
from fastbyol.system.command_line import ANY_SOURCE, address_digest, is_address, shown
from fastbyol.system.shell import operand

PREP = (sys.executable, "-m", "fastbyol.data_prep.cli")
SILENT_S = 2.0  # a conversion that takes longer is said to run
POLL_S = 0.1  # between two tries of a lock
FIRST_LINE = re.compile(r"(.*\.beton): \d+ images, ")  # of what fastbyol-prep write prints


def folder_of(run: Path, cache: Path | None) -> Path:
    """Return the folder of converted images: the one given, or that beside a run's folder."""
    return cache or Path(os.path.abspath(run)).parent / "cache"  # noqa: PTH100 - resolve() would follow links


@dataclass(frozen=True)
class Cache:
    """Converted sources: a folder of .beton files, each named after its source, the state of that, and the flags.

    flags: of fastbyol-prep write; command: the name that messages begin with; end_s: the time.monotonic() at which a
    conversion is given up, None for never.
    """

    folder: Path
    flags: tuple[str, ...] = ()
    command: str = "fastbyol-train"
    end_s: float | None = None

    @property
    def drops_labels(self) -> bool:
        """Whether the flags say that images have no labels."""
        return "--labels=none" in self.flags or ("--labels", "none") in pairwise(self.flags)

    def pair(self, train: str, val: str) -> tuple[str, str]:
        """Return the .beton of each of two sources, the classes of the second numbered as in the first."""
        first = self.beton(train)
        return first, first if val == train else self.beton(val, like=first)

    def beton(self, source: str, *, like: str | None = None) -> str:
        """Return the path of a source's .beton, written only where there is none of its present files and these flags.

        A .beton is returned as it is. like: another .beton, whose classes are to have the same numbers here. Several
        processes may ask at once. Raises ConfigError where the source cannot be converted; fastbyol-prep has then
        printed why.
        """
        if not source:
            raise ConfigError(f"an empty path is given for images; give {ANY_SOURCE}")
        if is_converted(source):
            return source
        flags = [*self.flags, *([] if like is None else self._same_classes(like))]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._turn(source, flags) as turn:
            command = [*PREP, "write", operand(source), operand(self.folder), *flags]
            said = self._write(command, source, turn=turn)
        first = FIRST_LINE.match(said)
        if first is None:
            raise ConfigError(f"--prep={' '.join(self.flags)} converts nothing; give flags of fastbyol-prep write")
        return str(self.folder / Path(first[1]).name)  # a folder's name that is no text is printed with escapes

    def _left_s(self) -> float:
        return math.inf if self.end_s is None else max(self.end_s - time.monotonic(), 0.0)

    @contextmanager
    def _turn(self, source: str, flags: Sequence[str]) -> Iterator[IO[bytes] | None]:
        """Wait until no other process converts this source; yield the locked file, None where locks do not work."""
        key = os.fsencode("\0".join([_absolute(source), *flags]))
        path = self.folder / f".{hashlib.blake2b(key, digest_size=8).hexdigest()}.lock"
        try:
            file: IO[bytes] = path.open("ab")
        except OSError:  # another user's, or on a disk that is read only
            yield None
            return
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not self._left_s():
                        raise self._out_of_time(source) from None
                    time.sleep(POLL_S)
                    continue
                except OSError:  # a file system without locks
                    pass
                yield file
                return

    def _write(self, command: list[str], source: str, *, turn: IO[bytes] | None) -> str:
        """Run fastbyol-prep, and end it with this process's interruption or time; return what it printed.

        It holds the lock as well, so that a process that is killed does not leave it to others while it still writes.
        """
        kept = () if turn is None else (turn.fileno(),)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=kept)
        try:
            said = _wait(process, min(self._left_s(), SILENT_S))
            if said is None and self._left_s():
                print(f"{self.command}: {shown(source)} is converted, once, to {self.folder}", file=sys.stderr)
                said = _wait(process, self._left_s())
            if said is None:
                raise self._out_of_time(source)
        finally:
            if process.poll() is None:
                process.terminate()  # it goes on from there another time
                process.wait()
        for line in said.splitlines():
            print(f"{self.command}: {line}", file=sys.stderr)
        if process.returncode < 0:
            raise ConfigError(
                f"the conversion of {shown(source)} was killed by signal {-process.returncode}; try it again"
            )
        if process.returncode:
            raise ConfigError(
                f"{shown(source)} cannot be used, as said above; give {ANY_SOURCE}, with its flags in --prep, as in "
                "--prep='--labels none' or --prep='--on-error skip'"
            )
        return said

    def _out_of_time(self, source: str) -> ConfigError:
        return ConfigError(
            f"{shown(source)} could not be converted within the budget; give a longer --budget, or a file that "
            "fastbyol-prep write has written before"
        )

    def _same_classes(self, beton: str) -> list[str]:
        """Return the flag that numbers classes as another .beton does, if that has classes and they are wanted."""
        if self.drops_labels:
            return []
        try:
            with Reader(beton) as reader:
                return [] if reader.class_names is None else [f"--classes-from={beton}"]
        except BetonError:  # the run will say what is wrong with it
            return []


def is_converted(source: str) -> bool:
    """Return whether a path is that of a .beton, there or not; fastbyol-prep says what to do with one elsewhere."""
    return not is_address(source) and (source.endswith(".beton") or is_beton(Path(source)))


def is_conversion_of(beton: str | None, source: str) -> bool:
    """Return whether a .beton is there that was converted from this source, in whatever state that was."""
    if beton is None or is_converted(source):
        return False
    with suppress(BetonError), Reader(beton) as reader:
        if is_address(source):
            return bool(reader.sidecar.get("address_digest") == address_digest(source))
        origin: str = reader.sidecar.get("source", "")
        return _absolute(origin) == _absolute(source)
    return False


def _absolute(source: str) -> str:
    """Return a source as it is called from any folder."""
    return source.rstrip("/") if is_address(source) else os.path.abspath(source)  # noqa: PTH100 - a pattern need not be a path


def _wait(process: subprocess.Popen[str], seconds: float) -> str | None:
    """Return what a process has printed when it ends; None if it still runs after so many seconds."""
    try:
        return process.communicate(timeout=None if seconds == math.inf else seconds)[0]
    except subprocess.TimeoutExpired:
        return None
