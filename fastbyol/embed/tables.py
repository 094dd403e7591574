"""Rows as parquet or CSV: of a stream of blocks, so that memory holds one of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastbyol.storage import files

KINDS = {"text": "string", "whole": "int64", "real": "float32"}  # of a column -> pyarrow's names


def write(path: Path, columns: Mapping[str, str], blocks: Iterable[Sequence[Sequence[Any]]]) -> None:
    """Write blocks of columns, each a kind of KINDS, in the form that the suffix names: .parquet, else CSV."""
    with files.replacement(path) as file:
        if path.suffix == ".parquet":
            import pyarrow as pa  # noqa: PLC0415 - of an extra

            types = {name: pa.type_for_alias(KINDS[kind]) for name, kind in columns.items()}
            with parquet_writer(
                file, types, repeated=[name for name, kind in columns.items() if kind == "text"]
            ) as add:
                for block in blocks:
                    add([pa.array(values, of) for values, of in zip(block, types.values(), strict=True)])
            return
        file.write(csv_line(list(columns)))
        for block in blocks:
            file.write(b"".join(csv_line(row) for row in zip(*block, strict=True)))


@contextmanager
def parquet_writer(
    file: IO[bytes], columns: Mapping[str, Any], *, repeated: Sequence[str]
) -> Iterator[Callable[[list[Any]], None]]:
    """Open a parquet file of columns with these types; yield a function that adds a row group of their arrays.

    repeated: the columns whose values come again and again, which are stored once a row group.
    """
    import pyarrow as pa  # noqa: PLC0415 - of an extra
    import pyarrow.parquet as pq  # noqa: PLC0415 - of an extra

    schema = pa.schema(list(columns.items()))
    with pq.ParquetWriter(file, schema, use_dictionary=list(repeated)) as writer:
        yield lambda arrays: writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def csv_line(values: Sequence[Any]) -> bytes:
    """Format a line of CSV as UTF-8; a text with commas, quotes or line ends is quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode(errors="backslashreplace")
