"""The base of text formats: planning streams a file once, and records the byte where each range begins."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import BinaryIO

import pyarrow as pa

from flux_batch.prompts.formats.file import PromptBytes, skip_to
from flux_batch.prompts.formats.table import BadRow, Row, RowRange, ranges_from


class LineTable:
    """A text file whose records begin at the start of a line."""

    def __init__(self, file: PromptBytes) -> None:
        self.file = file

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter."""
        with self.file.open_text() as text:
            yield from ranges_from(self.starts(text), num_rows)

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range one by one."""
        with self.file.open_text() as text:
            for _, row in islice(self.records(text, rows.offset), rows.num_rows):
                yield row

    def each_of(self, rows: RowRange) -> list[RowRange]:
        """Return a range for each row of a range, with its byte and its line."""
        with self.file.open_text() as text:
            starts = islice(self.starts(text, rows.offset, rows.line), rows.num_rows)
            is_known = rows.line > 0 or rows.offset == 0
            return list(ranges_from(((at, line if is_known else 0) for at, line in starts), 1, rows.start))

    def starts(self, text: BinaryIO, offset: int = 0, line: int = 1) -> Iterator[tuple[int, int]]:
        """Yield the byte and the line where each record begins; `line` is the line at `offset`."""
        found = enumerate(lines(text, offset), start=line if offset else 1)
        return ((at, number) for number, (at, content) in found if content.strip())

    def records(self, text: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield the byte offset and the row of each record from `offset` on; 0 starts at the first record."""
        raise NotImplementedError


def lines(text: BinaryIO, offset: int, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the content of each line from `offset` on; `at` is the file's present position."""
    skip_to(text, offset, at)
    for line in text:
        yield offset, line
        offset += len(line)


def decoded(line: bytes) -> str:
    """Return a line as text, without a byte order mark, which concatenated files leave inside.

    Raises: UnicodeDecodeError.
    """
    return line.decode("utf-8-sig")


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """Return the bad row for bytes that are not UTF-8."""
    return BadRow(f"not UTF-8: byte {error.object[error.start]:#04x} is not a character; save the file as UTF-8")


def header_names(values: Sequence[str]) -> list[str]:
    """Return the stripped names of a header's columns; a trailing comma gives an empty name."""
    return [value.strip() for value in values]


def header_schema(names: Sequence[str]) -> pa.Schema:
    """Return the named columns of a header as text columns."""
    return pa.schema([(name, pa.string()) for name in names if name])


def fitted(values: Sequence[str], names: Sequence[str]) -> Row | BadRow:
    """Return the fields of a record by column; fields without a column name must be empty or missing."""
    named = len(names)
    while named and not names[named - 1]:
        named -= 1
    if len(values) < named or any(value.strip() for value in values[len(names) :]):
        return BadRow(f"{len(values)} fields where the header has {len(names)}")
    if named > 1 and [value.strip() for value in values[:named]] == list(names[:named]):
        return BadRow("this is the header again, as in concatenated files")
    return {name: value or None for name, value in zip(names, values, strict=False) if name}
