"""The transfer of one file: continued or begun anew where it was cut, and under its name only when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import BinaryIO

from fastbyol.data_prep.remote.failures import WAITS_S, may_pass, remote_errors
from fastbyol.data_prep.remote.server import Entry, Restarted, Server
from fastbyol.data_prep.sources.base import SourceError


class Stopped(Exception):
    """A transfer was given up, because nobody waits for it any more."""


class Transfer:
    """The transfer of a file to `path`; what has come lies in `unfinished` until all has.

    where: how errors call the file; on_bytes: called with each number of bytes that have come, below 0 for bytes that
    are thrown away; waits_s: between tries that bring nothing new.
    """

    def __init__(
        self,
        server: Server,
        file: Entry,
        path: Path,
        *,
        unfinished: Path,
        where: str,
        stop: Event,
        on_bytes: Callable[[int], object],
        waits_s: Sequence[float] = WAITS_S,
    ) -> None:
        self._server, self._file, self._path, self._unfinished = server, file, path, unfinished
        self._where, self._stop, self._on_bytes, self._waits_s = where, stop, on_bytes, waits_s
        # Else what has come may belong to what the file was before.
        self._can_continue = file.size is not None and file.stamp != ""

    def run(self) -> int:
        """Fetch the file and return its size; raise SourceError for the server's errors, OSError for this machine's."""
        with self._unfinished.open("ab") as out:
            if not self._can_continue or out.tell() > (self._file.size or 0):
                self._begin_anew(out)
            furthest, waits = out.tell(), iter(self._waits_s)
            while (error := self._try(out)) is not None:
                if out.tell() > furthest:
                    furthest, waits = out.tell(), iter(self._waits_s)
                wait_s = next(waits, None)
                if wait_s is None:
                    raise error
                if self._stop.wait(wait_s):
                    raise Stopped
            size = out.tell()
        if self._stop.is_set():
            raise Stopped
        self._unfinished.replace(self._path)
        return size

    def _try(self, out: BinaryIO) -> SourceError | None:
        """Fetch what is missing; return the error after which another try may bring more, None if all is there."""
        try:
            if out.tell() != self._file.size:
                self._go_on(out)
        except Restarted:
            self._begin_anew(out)
            return SourceError(f"{self._where}: the server does not send its rest; try again")
        except SourceError as error:
            if not may_pass(error):
                raise
            if not self._can_continue:
                self._begin_anew(out)
            return error
        count = out.tell()
        if self._file.size not in (None, count):
            self._begin_anew(out)
            raise SourceError(
                f"{self._where}: {count} bytes came, where the server had announced {self._file.size}; try again"
            )
        return None

    def _go_on(self, out: BinaryIO) -> None:
        """Write what one more reading brings."""
        parts = self._server.read(self._file, out.tell())
        while True:
            with remote_errors(self._where):
                data = next(parts, None)
            if data is None:
                return
            if self._stop.is_set():
                raise Stopped
            out.write(data)
            self._on_bytes(len(data))
            if self._file.size is not None and out.tell() > self._file.size:
                return  # it is the wrong file, and may never end

    def _begin_anew(self, out: BinaryIO) -> None:
        self._on_bytes(-out.tell())
        out.seek(0)
        out.truncate()
