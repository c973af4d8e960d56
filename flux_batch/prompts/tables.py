"""One file of prompts in any format: its columns, its ranges of rows, the rows of a range.

Knows Parquet, JSON Lines, CSV and plain text; does not know what a column means.
A row that cannot be parsed is a BadRow in its position, so that the other rows of the file can be used.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.errors import SourceError, one_line
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import translated
from flux_batch.storage.store import open_filesystem

Row = dict[str, Any]
_BUFFER_BYTES = 1 << 20
# Rows of Parquet decoded at a time: many rows of text, few of images.
_BATCH_ROWS, BATCH_BYTES = 8192, 64 << 20


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be parsed, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows start .. start + num_rows of a file; `offset` is the byte where the first begins (0 for Parquet)."""

    start: int
    num_rows: int
    offset: int = 0


class Table(Protocol):
    """A prompts file, opened for reading."""

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        """Return the Arrow type of each of `columns` that the file has."""
        ...

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter."""
        ...

    def read(self, rows: RowRange, columns: Collection[str]) -> list[Row | BadRow]:
        """Read the rows of a range from `split`; columns other than `columns` may be left out."""
        ...

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the same rows one by one, so that a column of images is never in memory whole."""
        ...


def open_table(uri: str, storage_options: Mapping[str, Any]) -> Table:
    """Open a prompts file by its suffix. Raises: SourceError for another suffix or an unreadable file."""
    suffix = public_uri(uri).rpartition(".")[2].lower()
    if suffix not in TABLE_FORMATS:
        raise SourceError(f"{uri}: prompts must be {', '.join(f'.{known}' for known in TABLE_FORMATS)}")
    return TABLE_FORMATS[suffix](uri, storage_options)


@dataclass(frozen=True)
class _File:
    uri: str
    storage_options: Mapping[str, Any]

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        fs, path = open_filesystem(self.uri, self.storage_options)
        with translated(self.uri, "read"), fs.open(path, "rb") as file:
            # Without a buffer, s3fs copies a whole block of megabytes for every line.
            yield io.BufferedReader(file, _BUFFER_BYTES)


class _ParquetTable(_File):
    """A Parquet file, read by row group; planning reads the footer alone."""

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        with self._parquet() as parquet:
            schema = parquet.schema_arrow
        return {name: schema.field(name).type for name in columns if name in schema.names}

    def split(self, num_rows: int) -> Iterator[RowRange]:
        with self._parquet() as parquet:
            total = parquet.metadata.num_rows
        for start in range(0, total, num_rows):
            yield RowRange(start, min(num_rows, total - start))

    def read(self, rows: RowRange, columns: Collection[str]) -> list[Row | BadRow]:
        return list(self.stream(rows, columns))

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
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

    @contextmanager
    def _parquet(self) -> Iterator[pq.ParquetFile]:
        with self.open() as file:
            try:
                yield pq.ParquetFile(file, pre_buffer=True)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
                if isinstance(error, OSError) and not _is_damage(error):
                    raise
                raise SourceError(f"{self.uri}: not a readable Parquet file: {one_line(error)}") from error


def _is_damage(error: OSError) -> bool:
    """Return whether an error is of Arrow's decoding and not of the file system, whose errors have a number."""
    return type(error) is OSError and error.errno is None


def _rows_of_group(
    parquet: pq.ParquetFile, group: int, names: list[str], start: int, end: int
) -> Iterator[Row | BadRow]:
    """Yield the rows start .. end of one row group, so that a huge group is never in memory whole."""
    about = parquet.metadata.row_group(group)
    per_row = max(1, about.total_byte_size // max(1, about.num_rows))
    batch_size = max(1, min(_BATCH_ROWS, BATCH_BYTES // per_row))
    first = 0
    for batch in parquet.iter_batches(batch_size=batch_size, row_groups=[group], columns=names):
        if first >= end:
            break
        low, high = max(start - first, 0), min(end - first, batch.num_rows)
        if low < high:
            yield from _python_rows(batch.slice(low, high - low))
        first += batch.num_rows


def _python_rows(batch: pa.RecordBatch) -> list[Row | BadRow]:
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:  # Parquet's text is UTF-8 by promise only
        if batch.num_rows == 1:
            return [BadRow(f"not UTF-8: {error}")]
        return [row for at in range(batch.num_rows) for row in _python_rows(batch.slice(at, 1))]


class _LineTable(_File):
    """A text file: planning streams it once and notes the byte where each range begins."""

    def split(self, num_rows: int) -> Iterator[RowRange]:
        start = offset = count = 0
        with self.open() as file:
            for at, _ in self._records(file):
                if count == 0:
                    offset = at
                count += 1
                if count == num_rows:
                    yield RowRange(start, count, offset)
                    start, count = start + count, 0
        if count:
            yield RowRange(start, count, offset)

    def read(self, rows: RowRange, columns: Collection[str]) -> list[Row | BadRow]:
        return list(self.stream(rows, columns))

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        with self.open() as file:
            for _, row in islice(self._records(file, rows.offset), rows.num_rows):
                yield row

    def _records(self, file: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield the byte offset and the row of each record from `offset` on (0: from the first record)."""
        raise NotImplementedError


class _TextTable(_LineTable):
    """A text file with one prompt a line; blank lines do not count."""

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        return {name: pa.string() for name in columns if name == "prompt"}

    def _records(self, file: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        for at, line in _lines(file, offset):
            if line.strip():
                try:
                    yield at, {"prompt": line.decode("utf-8-sig" if at == 0 else "utf-8").strip()}
                except UnicodeDecodeError as error:
                    yield at, BadRow(f"not UTF-8: {error}")


class _JsonLinesTable(_LineTable):
    """A file with one JSON object a line; blank lines do not count."""

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        """Return each column's type after reading the whole file; mixed types become JSON text."""
        kinds: dict[str, set[type]] = {}
        wanted = set(columns)
        with self.open() as file:
            for _, row in self._records(file):
                if isinstance(row, dict):
                    for name in wanted & row.keys():
                        kinds.setdefault(name, set()).add(_kind(row[name]))
        return {name: _arrow_type(found - {type(None)}) for name, found in kinds.items()}

    def _records(self, file: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        for at, line in _lines(file, offset):
            if line.strip():
                yield at, _json_row(line)


def _json_row(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # JSON can spell half a surrogate pair, which no file can hold
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON: {error}")
    return row if isinstance(row, dict) else BadRow("not a JSON object")


class _CsvTable(_LineTable):
    """A file of comma-separated values with a header; quoted fields may contain line breaks."""

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        with self.open() as file:
            names = self._header(file)[0]
        return {name: pa.string() for name in columns if name in names}

    def _records(self, file: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        names, first = self._header(file)
        lines = _Decoder(_lines(file, offset or first))
        reader = csv.reader(lines)
        while True:
            at = lines.end
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield at if at is not None else first, BadRow(f"not valid CSV: {error}")
                continue
            if not values:
                continue
            start = offset or first if at is None else at
            if len(values) == len(names):
                yield start, {name: value or None for name, value in zip(names, values, strict=True)}
            else:
                yield start, BadRow(f"{len(values)} fields where the header has {len(names)}")

    def _header(self, file: BinaryIO) -> tuple[list[str], int]:
        """Read the column names and the byte where the first record begins."""
        lines = _Decoder(_lines(file, 0))
        try:
            names = next(csv.reader(lines))
        except (StopIteration, csv.Error) as error:
            raise SourceError(f"{self.uri}: the first line, which must name the columns, cannot be read") from error
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise SourceError(f"{self.uri}: column {min(duplicates)!r} stands twice in the CSV header")
        return names, lines.end or 0


class _Decoder:
    """An iterator of lines for the csv module that knows the byte after the last line read."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        self._lines = lines
        self.end: int | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        at, line = next(self._lines)
        self.end = at + len(line)
        # An invalid byte becomes a replacement character, visible in the prompt; the rest of the file can be read.
        return line.decode("utf-8-sig" if at == 0 else "utf-8", errors="replace")


def _lines(file: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    file.seek(offset)
    for line in file:
        yield offset, line
        offset += len(line)


def _kind(value: Any) -> type:
    """Return the type of a JSON value; an integer too large for a column counts as text."""
    return str if isinstance(value, int) and not -(2**63) <= value < 2**63 else type(value)


def _arrow_type(kinds: set[type]) -> pa.DataType:
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    return pa.string()


TABLE_FORMATS: dict[str, type[_ParquetTable] | type[_TextTable] | type[_JsonLinesTable] | type[_CsvTable]] = {
    "parquet": _ParquetTable,
    "jsonl": _JsonLinesTable,
    "csv": _CsvTable,
    "txt": _TextTable,
}
