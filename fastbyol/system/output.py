"""Streams that a command prints to: an error in writing them ends no work, but changes the exit status."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any

from fastbyol.system.command_line import BAD_INPUT, DONE, fail


class _Lasting(io.FileIO):
    """A stream that drops what it cannot write; refusal: the first error, except of a reader that has gone."""

    refusal: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them; return their number."""
        try:
            while (written := super().write(data)) is None:  # a pipe that is full, and does not block
                select.select([], [self], [])
        except BrokenPipeError:  # as with `| head`
            return len(data)
        except OSError as error:
            self.refusal = self.refusal or error
            return len(data)
        return written


def run_command(name: str, main: Callable[[], int]) -> int:
    """Run a command whose output cannot end its work; return its status, or 2 where a disk refused what it printed.

    Progress that cannot be written is dropped: a run of hours does not end because `| head` has seen enough. A stream
    that has been put in place of the process's own is left as it is.
    """
    before = sys.stdout, sys.stderr
    stdout, _ = _make_lasting("stdout"), _make_lasting("stderr")
    try:
        status = _status_of(main)
        sys.stdout.flush()
        sys.stderr.flush()
        if status == DONE and stdout is not None and stdout.refusal is not None:
            stdout.refusal.filename = "stdout"
            return fail(name, stdout.refusal, status=BAD_INPUT)
        return status
    finally:
        sys.stdout, sys.stderr = before


def _status_of(main: Callable[[], int]) -> int:
    """Run a command; return its status, also where it exits with success, as --help does."""
    try:
        return main()
    except SystemExit as ended:
        if ended.code not in (None, DONE):
            raise
        return DONE


def _make_lasting(name: str) -> _Lasting | None:
    """Replace a stream of the process by a lasting one, which escapes names that are no text; return its file."""
    stream = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__"):
        return None
    is_closed = stream is None  # as after >&-
    if not is_closed:
        stream.flush()
    file = _Lasting(os.devnull if is_closed else stream.fileno(), "w", closefd=is_closed)
    encoding = "utf-8" if is_closed else stream.encoding
    text = io.TextIOWrapper(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=True)
    setattr(sys, name, text)
    return file
