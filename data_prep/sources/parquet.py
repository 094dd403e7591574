"""One parquet file, read in pieces: a row group may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.columns import Column

BUFFER_BYTES = 1 << 20


class ParquetFile:
    """An open parquet file."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.schema = table.schema_arrow
        self.count: int = table.metadata.num_rows

    def may_lack(self, column: Column) -> bool:
        """Return whether a column may have rows without a value, as the counts in the file tell."""
        groups = (self._table.metadata.row_group(number) for number in range(self._table.num_row_groups))
        parts = (group.column(number) for group in groups for number in range(group.num_columns))
        found = [part.statistics for part in parts if part.path_in_schema == ".".join(column)]
        return any(each is None or not each.has_null_count or each.null_count for each in found)

    def batches(self, columns: Sequence[Column], rows: int) -> Iterator[Any]:
        """Yield record batches of up to so many rows, with no more of the table than these columns."""
        names = [".".join(column) for column in columns]
        for batch in self._table.iter_batches(rows, columns=names, use_threads=False):
            batch.validate(full=True)
            yield batch


@contextmanager
def open_parquet(file: Path) -> Iterator[ParquetFile]:
    """Open one parquet file; raise SourceError for any error in the with-block."""
    try:
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
            yield ParquetFile(table)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: cannot be read as parquet: {error}; copy it again") from error
