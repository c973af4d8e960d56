"""Arrow files, Feather and the streams of Hugging Face data sets; batches as rows of Python values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import pyarrow as pa

from flux_batch.errors import SourceError, one_line
from flux_batch.prompts.formats.file import PromptBytes, is_damage
from flux_batch.prompts.formats.table import BadRow, Row, RowRange, ranges_of
from flux_batch.storage.passthrough import is_known_zone, value_of, values_of

# The low bits of an offset are a row number within a record batch; the high bits are the place of the batch.
_ROW_BITS = 24
ARROW_MAGIC, STREAM_MAGIC = b"ARROW1", b"\xff\xff\xff\xff"


class ArrowTable:
    """A file of Arrow record batches, with a footer or as a stream."""

    def __init__(self, file: PromptBytes) -> None:
        self._file = file

    def schema(self) -> pa.Schema:
        """Return all columns."""
        if not self._file.head:
            return pa.schema([])
        with self._reader() as (_, reader):
            return reader.schema

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter.

        The offset of a range encodes the place of the record batch in which it begins, and its first row in that batch.
        """
        firsts: list[int] = []
        places: list[int] = []
        total = 0
        for place, batch in self._batches():
            firsts.append(total)
            places.append(place)
            total += batch.num_rows
        for rows in ranges_of(total, num_rows):
            at = bisect_right(firsts, rows.start) - 1
            num_before = rows.start - firsts[at]
            is_known = places[at] >= 0 and num_before >> _ROW_BITS == 0
            yield replace(rows, offset=(places[at] << _ROW_BITS) + num_before if is_known else 0)

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range one by one."""
        # The offset is 0 in old plans and at the start of a file.
        place, num_before = divmod(rows.offset, 1 << _ROW_BITS) if rows.offset else (0, rows.start)
        left = rows.num_rows
        for _, batch in self._batches(place):
            low = min(num_before, batch.num_rows)
            high = min(low + left, batch.num_rows)
            num_before, left = num_before - low, left - (high - low)
            if low < high:
                names = [name for name in batch.schema.names if name in columns]
                yield from python_rows(batch.select(names).slice(low, high - low))
            if not left:
                return

    def each_of(self, rows: RowRange) -> list[RowRange]:
        """Return a range for each row of a range; offset 0 means a search by its number."""
        room = (1 << _ROW_BITS) - rows.offset % (1 << _ROW_BITS)
        offsets = (rows.offset + number if rows.offset and number < room else 0 for number in range(rows.num_rows))
        return [RowRange(rows.start + number, 1, offset) for number, offset in enumerate(offsets)]

    def _batches(self, place: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the record batches from `place` on, each with its place: its number, or its byte in a stream."""
        if not self._file.head:
            return
        with self._reader() as (file, reader):
            found = _of_stream(file, reader, place) if self._is_stream else _of_file(reader, place)
            for at, batch in found:
                batch.validate(full=True)  # the offsets of a damaged file could point outside its memory
                yield at, batch

    @property
    def _is_stream(self) -> bool:
        return not self._file.head.startswith(ARROW_MAGIC)

    @contextmanager
    def _reader(self) -> Iterator[tuple[BinaryIO, pa.RecordBatchFileReader | pa.RecordBatchStreamReader]]:
        with self._file.open() as file:
            try:
                yield file, pa.ipc.open_stream(file) if self._is_stream else pa.ipc.open_file(file)
            except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # names are UTF-8 by promise only
                if isinstance(error, OSError) and not is_damage(error):
                    raise
                raise SourceError(f"{self._file.uri}: not a readable Arrow file: {one_line(error)}") from error


def _of_file(reader: pa.RecordBatchFileReader, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    return ((number, reader.get_batch(number)) for number in range(first, reader.num_record_batches))


def _of_stream(file: BinaryIO, reader: pa.RecordBatchStreamReader, begin: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the batches of a stream from byte `begin` on, each with its byte.

    With dictionaries, which are sent only once, the byte is -1: such a stream must be read from its start.
    """
    has_dictionaries = "dictionary<" in str(reader.schema.types)
    if begin:
        file.seek(begin)
    while True:
        at = -1 if has_dictionaries else file.tell()
        try:
            yield at, reader.read_next_batch()
        except StopIteration:
            return


def python_rows(batch: pa.RecordBatch) -> list[Row | BadRow]:
    """Return the rows of a batch.

    A time that Python's types cannot hold, in nanoseconds or after the year 9999, stays an Arrow scalar.
    """
    columns = [_values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    rows: list[Row | BadRow] = []
    for values in zip(*columns, strict=True):
        bad = next((value for value in values if isinstance(value, BadRow)), None)
        rows.append(bad or dict(zip(batch.schema.names, values, strict=True)))
    return rows


def _values(name: str, column: pa.Array) -> list[Any]:
    """Return the values of a column, with a BadRow for each unreadable one."""
    if _is_of_unknown_zone(column.type):
        column = column.cast(pa.timestamp(column.type.unit, "UTC"))
    try:
        return values_of(column)
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(name, value) for value in column]


def _value(name: str, value: pa.Scalar) -> Any:
    try:
        return value_of(value)
    except UnicodeDecodeError as error:  # the text of Parquet is UTF-8 by promise only
        return BadRow(f"column {name!r} is not UTF-8: {one_line(error)}")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return BadRow(f"column {name!r} cannot be read: {one_line(error)}")


def _is_of_unknown_zone(kind: pa.DataType) -> bool:
    if not pa.types.is_timestamp(kind) or kind.tz is None:
        return False
    return not is_known_zone(kind.tz)
