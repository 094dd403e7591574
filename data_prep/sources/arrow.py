"""One file of Arrow's record batches, a stream or with an index at its end, mapped and read batch by batch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.columns import Column, array_of

INDEXED = b"ARROW1"  # at the start of a file that has an index
ROWS = 1 << 16  # that are looked at in one piece
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream


class ArrowFile:
    """An open file of record batches. Opening reads through it once, but not what its columns hold."""

    def __init__(self, file: Path, mapped: mmap.mmap) -> None:
        self._file, self._mapped = file, mapped
        self._is_indexed = mapped[: len(INDEXED)] == INDEXED
        self.schema = self._open()[1].schema
        self.count: int = sum(batch.num_rows for batch in self._record_batches())

    def may_lack(self, column: Column) -> bool:
        """Return whether a column has rows without a value."""
        return any(array_of(batch, column).null_count for batch in self.batches([column], ROWS))

    def batches(self, columns: Sequence[Column], rows: int) -> Iterator[Any]:
        """Yield record batches of up to so many rows, with no more of the table than these columns and what is in them.

        What was read of the file is given back then, or the process would seem to grow by the whole of it.
        """
        names = list(dict.fromkeys(column[0] for column in columns))
        for batch in self._record_batches():
            chosen = batch.select(names)
            chosen.validate(full=True)
            for start in range(0, chosen.num_rows, rows):
                yield chosen.slice(start, rows)
                self._mapped.madvise(mmap.MADV_DONTNEED)

    def _record_batches(self) -> Iterator[Any]:
        source, reader = self._open()
        if self._is_indexed:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        yield from reader
        if source.tell() != len(self._mapped) or self._mapped[-len(END) :] != END:
            raise SourceError(f"{self._file}: cut short, or more follows the end of its stream; copy or write it again")

    def _open(self) -> tuple[Any, Any]:
        source = pa.BufferReader(pa.py_buffer(self._mapped))
        return source, (pa.ipc.open_file if self._is_indexed else pa.ipc.open_stream)(source)


@contextmanager
def open_arrow(file: Path) -> Iterator[ArrowFile]:
    """Open one file of record batches; raise SourceError for any error in the with-block."""
    try:
        with file.open("rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                raise SourceError(f"{file}: empty; copy it again")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)  # closed by the last that reads it
        yield ArrowFile(file, mapped)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: cannot be read as arrow: {error}; copy it again") from error
