"""Parquet, read by row group; planning reads only the footer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.errors import SourceError, one_line
from flux_batch.prompts.formats.arrow import python_rows
from flux_batch.prompts.formats.file import PromptBytes, is_damage
from flux_batch.prompts.formats.table import BadRow, Row, RowRange, ranges_of

# Limits of a decoded batch: many rows of text, few of images.
_BATCH_ROWS, BATCH_BYTES = 8192, 64 << 20


class ParquetTable:
    """A Parquet file; an empty file, as Spark may leave it, has no rows."""

    def __init__(self, file: PromptBytes) -> None:
        self._file = file

    def schema(self) -> pa.Schema:
        """Return all columns."""
        return self._footer[0]

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter."""
        yield from ranges_of(self._footer[1], num_rows)

    @cached_property
    def _footer(self) -> tuple[pa.Schema, int]:
        """The columns and the number of rows; the footer itself may be large and is not kept."""
        if not self._file.head:
            return pa.schema([]), 0
        with self._parquet() as parquet:
            return parquet.schema_arrow, parquet.metadata.num_rows

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range one by one; a column of images is never read as a whole."""
        with self._parquet() as parquet:
            names = [name for name in parquet.schema_arrow.names if name in columns]
            first = 0
            end = rows.start + rows.num_rows
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                if first < end and rows.start < first + size:
                    start = max(rows.start - first, 0)
                    yield from _rows_of_group(parquet, group, names, start, min(end - first, size))
                first += size

    def columns(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of all rows."""
        with self._parquet() as parquet:
            yield from parquet.iter_batches(columns=list(names))

    @contextmanager
    def _parquet(self) -> Iterator[pq.ParquetFile]:
        with self._file.open() as file:
            try:
                yield pq.ParquetFile(file, pre_buffer=True)
            except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # names may not be UTF-8
                if isinstance(error, OSError) and not is_damage(error):
                    raise
                raise SourceError(f"{self._file.uri}: not a readable Parquet file: {one_line(error)}") from error


def _rows_of_group(
    parquet: pq.ParquetFile, group: int, names: list[str], start: int, end: int
) -> Iterator[Row | BadRow]:
    """Yield the rows [start, end) of one row group; a huge group is never read as a whole."""
    about = parquet.metadata.row_group(group)
    per_row = max(1, about.total_byte_size // max(1, about.num_rows))
    batch_size = max(1, min(_BATCH_ROWS, BATCH_BYTES // per_row))
    first = 0
    for batch in parquet.iter_batches(batch_size=batch_size, row_groups=[group], columns=names):
        if first >= end:
            break
        low, high = max(start - first, 0), min(end - first, batch.num_rows)
        if low < high:
            yield from python_rows(batch.slice(low, high - low))
        first += batch.num_rows
