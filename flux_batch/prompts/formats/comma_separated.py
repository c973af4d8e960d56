"""CSV with a header, separated by commas, semicolons or tabs; quoted fields may contain line breaks."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from itertools import takewhile
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from flux_batch.errors import SourceError
from flux_batch.prompts.formats.lines import (
    LineTable,
    decoded,
    fitted,
    header_names,
    header_schema,
    lines,
    not_utf8,
)
from flux_batch.prompts.formats.table import BadRow, Row

# The most characters of a field. The csv module's default of 131,072 is too low for long texts and base64.
_MAX_FIELD = 1 << 24
# The first of these that splits the header separates the columns; spreadsheets in Europe write semicolons.
_DELIMITERS = (",", ";", "\t")


class CsvTable(LineTable):
    """A file of comma-separated values; its first line names the columns, blank lines are skipped."""

    def schema(self) -> pa.Schema:
        """Return the columns in the header; none for an empty file."""
        with self.file.open_text() as text:
            return header_schema(self._header(text).names)

    def starts(self, text: BinaryIO, offset: int = 0, line: int = 1) -> Iterator[tuple[int, int]]:
        """Yield the byte and the line where each record begins."""
        header = self._header(text)
        first = line if offset else 1 + header.num_lines
        return ((at, first + number) for at, number, _ in self._records(text, header, offset))

    def records(self, text: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield the fields of each record by column."""
        return ((at, row) for at, _, row in self._records(text, self._header(text), offset))

    def _records(self, text: BinaryIO, header: _Header, offset: int) -> Iterator[tuple[int, int, Row | BadRow]]:
        """Yield the byte of each record, the lines between `offset` and it, and its fields."""
        if not header.names:
            return
        csv.field_size_limit(_MAX_FIELD)  # the csv module has only this setting for the whole process
        begin = offset or header.end
        source = _Lines(lines(text, begin, header.end))
        first_line = cache(lambda: self._num_lines(begin) + 1)  # counted only if a message needs it
        while source.begin():
            number = source.num_read
            try:
                values = next(csv.reader(source, delimiter=header.delimiter, skipinitialspace=header.is_spaced))
            except csv.Error as error:
                bad = _unclosed(source, header, first_line) or BadRow(f"not valid CSV: {error}")
                yield source.start, number, bad
                continue
            if values:
                yield source.start, number, _parsed(source, values, header, first_line)

    def _header(self, text: BinaryIO) -> _Header:
        """Read the first record that is not blank."""
        source = _Lines(lines(text, 0))
        try:
            while source.begin() and not any(value.strip("\ufeff \t") for value in next(csv.reader(source))):
                pass
            first = [decoded(line) for _, line in source.taken]
            if not first:
                return _Header([], ",", False, 0, 0)
            delimiter = next((each for each in _DELIMITERS if len(next(csv.reader(first, delimiter=each))) > 1), ",")
            raw = next(csv.reader(first, delimiter=delimiter))
            values = next(csv.reader(first, delimiter=delimiter, skipinitialspace=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(
                f"{self.file.uri}: the first line, which must name the columns, cannot be read"
            ) from error
        is_spaced = len(raw) > 1 and all(value.startswith(" ") for value in raw[1:])
        return _Header(header_names(values), delimiter, is_spaced, source.end, source.num_read)

    def _num_lines(self, end: int) -> int:
        """Return the number of lines before a byte."""
        with self.file.open_text() as text:
            return sum(1 for _ in takewhile(lambda each: each[0] < end, lines(text, 0)))


class _Header(NamedTuple):
    """The first record: its names, their delimiter, the byte after it and the number of lines up to it."""

    names: list[str]
    delimiter: str
    is_spaced: bool
    end: int
    num_lines: int


def _parsed(source: _Lines, values: list[str], header: _Header, first_line: Callable[[], int]) -> Row | BadRow:
    """Return a record's fields by column; a bad row for invalid UTF-8 or an unclosed quote."""
    if any("\ufffd" in value for value in values):
        try:
            b"".join(line for _, line in source.taken).decode("utf-8")
        except UnicodeDecodeError as error:
            return not_utf8(error)
    row = fitted(values, header.names)
    if len(source.taken) == 1:
        return row
    try:
        text = [line.decode("utf-8", "replace") for _, line in source.taken]
        next(csv.reader(text, delimiter=header.delimiter, skipinitialspace=header.is_spaced, strict=True))
    except csv.Error:
        return _unclosed(source, header, first_line) or row
    return row


def _unclosed(source: _Lines, header: _Header, first_line: Callable[[], int]) -> BadRow | None:
    """Return the bad row of an unclosed quote; put back lines that are whole rows.

    The last of several lines is not checked, since it may open the next quote.
    """
    (_, first), *others = source.taken
    if not others:
        return None
    last = first_line() + source.num_read - 1
    number = last - len(others)
    if all(_is_row(line, header) for _, line in (others[:-1] or others)):
        source.put_back(others)
        shown = first.decode("utf-8", "replace").strip()[:80]
        return BadRow(f"a quote is opened and not closed: {shown}")
    return BadRow(f"lines {number} to {last}: a quote is opened on line {number}, and includes the lines after it")


def _is_row(line: bytes, header: _Header) -> bool:
    """Return whether a line is a whole row by itself."""
    if line.count(b'"') % 2:
        return False
    values = next(csv.reader([line.decode("utf-8", "replace")], delimiter=header.delimiter), [])
    return not values or isinstance(fitted(values, header.names), dict)


class _Lines:
    """An iterator of lines for the csv module; it keeps the lines of a record and takes lines back."""

    def __init__(self, source: Iterator[tuple[int, bytes]]) -> None:
        self._source = source
        self._back: deque[tuple[int, bytes]] = deque()
        self.taken: list[tuple[int, bytes]] = []
        self.num_read = 0

    def begin(self) -> bool:
        """Begin a record. Returns: False at the end of the file."""
        self.taken = []
        line = self._next()
        if line is not None:
            self._back.appendleft(line)
        return line is not None

    @property
    def start(self) -> int:
        """The byte where the record begins."""
        return self.taken[0][0]

    @property
    def end(self) -> int:
        """The byte after the record."""
        at, line = self.taken[-1]
        return at + len(line)

    def put_back(self, taken: list[tuple[int, bytes]]) -> None:
        """Take lines back, so that they are read again."""
        self._back.extendleft(reversed(taken))
        self.num_read -= len(taken)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._next()
        if line is None:
            raise StopIteration
        self.taken.append(line)
        self.num_read += 1
        # An invalid byte becomes a replacement character here, and `_parsed` then returns a bad row.
        text = line[1].decode("utf-8", errors="replace")
        return text.removeprefix("\ufeff") if len(self.taken) == 1 else text

    def _next(self) -> tuple[int, bytes] | None:
        return self._back.popleft() if self._back else next(self._source, None)
