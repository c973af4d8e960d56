"""Arrow: its own files, Feather and the streams of Hugging Face data sets, and its batches as rows of Python values."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from flux_batch.errors import SourceError, one_line
from flux_batch.prompts.formats.file import PromptBytes, is_damage
from flux_batch.prompts.formats.table import BadRow, Row, RowRange, ranges_of
from flux_batch.storage.passthrough import is_known_zone

ARROW_MAGIC, STREAM_MAGIC = b"ARROW1", b"\xff\xff\xff\xff"


class ArrowTable:
    """A file of Arrow record batches, with a footer or as a stream."""

    def __init__(self, file: PromptBytes) -> None:
        self._file = file

    def schema(self) -> pa.Schema:
        """Return all columns."""
        if not self._file.head:
            return pa.schema([])
        with self._reader() as reader:
            return reader.schema

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter."""
        total = sum(batch.num_rows for batch in self._batches())
        yield from ranges_of(total, num_rows)

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range one by one."""
        first, end = 0, rows.start + rows.num_rows
        for batch in self._batches():
            low, high = max(rows.start - first, 0), min(end - first, batch.num_rows)
            if low < high:
                names = [name for name in batch.schema.names if name in columns]
                yield from python_rows(batch.select(names).slice(low, high - low))
            first += batch.num_rows
            if first >= end:
                return

    def _batches(self) -> Iterator[pa.RecordBatch]:
        if not self._file.head:
            return
        with self._reader() as reader:
            if isinstance(reader, pa.RecordBatchStreamReader):
                batches = iter(reader)
            else:
                batches = map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                batch.validate(full=True)  # the offsets of a damaged file lead out of its memory
                yield batch

    @contextmanager
    def _reader(self) -> Iterator[pa.RecordBatchFileReader | pa.RecordBatchStreamReader]:
        with self._file.open() as file:
            try:
                if self._file.head.startswith(ARROW_MAGIC):
                    yield pa.ipc.open_file(file)
                else:
                    yield pa.ipc.open_stream(file)
            except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # names are UTF-8 by promise only
                if isinstance(error, OSError) and not is_damage(error):
                    raise
                raise SourceError(f"{self._file.uri}: not a readable Arrow file: {one_line(error)}") from error


def python_rows(batch: pa.RecordBatch) -> list[Row | BadRow]:
    """Return the rows of a batch.

    A time that Python's own types cannot hold, of nanoseconds or of the year 10000, stays an Arrow scalar.
    """
    columns = [_values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    rows: list[Row | BadRow] = []
    for values in zip(*columns, strict=True):
        bad = next((value for value in values if isinstance(value, BadRow)), None)
        rows.append(bad or dict(zip(batch.schema.names, values, strict=True)))
    return rows


def _values(name: str, column: pa.Array) -> list[Any]:
    """Return the values of a column; a BadRow for one that cannot be read."""
    if _is_of_unknown_zone(column.type):
        column = column.cast(pa.timestamp(column.type.unit, "UTC"))
    if _is_time(column.type) and getattr(column.type, "unit", "") == "ns":
        return [value if value.is_valid else None for value in column]
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(name, value) for value in column]


def _value(name: str, value: pa.Scalar) -> Any:
    """Return one value as Python's, or unchanged if Python does not know the time."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:  # the text of Parquet is UTF-8 by promise only
        return BadRow(f"column {name!r} is not UTF-8: {one_line(error)}")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return value if _is_time(value.type) else BadRow(f"column {name!r} cannot be read: {one_line(error)}")


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind))


def _is_of_unknown_zone(kind: pa.DataType) -> bool:
    if not pa.types.is_timestamp(kind) or kind.tz is None:
        return False
    return not is_known_zone(kind.tz)
