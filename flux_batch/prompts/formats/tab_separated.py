"""Tab-separated values with a header; a quote is a character like any other."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
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


class TsvTable(LineTable):
    """A file of tab-separated values; its first line names the columns, blank lines are skipped."""

    def schema(self) -> pa.Schema:
        """Return the columns in the header; none for an empty file."""
        with self.file.open_text() as text:
            return header_schema(self._header(text).names)

    def starts(self, text: BinaryIO, offset: int = 0, line: int = 1) -> Iterator[tuple[int, int]]:
        """Yield the byte and the line where each record begins."""
        header = self._header(text)
        first = line if offset else 1 + header.num_lines
        found = enumerate(lines(text, offset or header.end, header.end), start=first)
        return ((at, number) for number, (at, content) in found if content.strip())

    def records(self, text: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield the fields of each line by column."""
        names, end, _ = self._header(text)
        for at, line in lines(text, offset or end, end):
            if line.strip():
                try:
                    yield at, fitted(_fields(line), names)
                except UnicodeDecodeError as error:
                    yield at, not_utf8(error)

    def _header(self, text: BinaryIO) -> _Header:
        """Read the first line that is not blank."""
        end, num_lines, line = 0, 0, b""
        for line in iter(text.readline, b""):
            end, num_lines = end + len(line), num_lines + 1
            if line.removeprefix(BOM_UTF8).strip():
                break
        try:
            return _Header(header_names(_fields(line)), end, num_lines)
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.file.uri}: the first line, which must name the columns, is not UTF-8") from error


class _Header(NamedTuple):
    """The first line: its names, the byte after it and the number of lines up to it."""

    names: list[str]
    end: int
    num_lines: int


def _fields(line: bytes) -> list[str]:
    return decoded(line).rstrip("\r\n").split("\t")
