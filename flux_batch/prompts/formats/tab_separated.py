"""Tab-separated values with a header; a quote is a character like any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

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
    """A file of tab-separated values; its first line names the columns, blank lines do not count."""

    def schema(self) -> pa.Schema:
        """Return the columns that the header names; none of a file without a byte."""
        with self.file.open_text() as text:
            return header_schema(self._header(text)[0])

    def starts(self, text: BinaryIO, offset: int = 0, line: int = 1) -> Iterator[tuple[int, int]]:
        """Yield the byte and the line where each record begins."""
        _, first = self._header(text)
        found = enumerate(lines(text, offset or first, first), start=line if offset else 2)
        return ((at, number) for number, (at, content) in found if content.strip())

    def records(self, text: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield the fields of each line by column."""
        names, first = self._header(text)
        for at, line in lines(text, offset or first, first):
            if line.strip():
                try:
                    yield at, fitted(_fields(line), names)
                except UnicodeDecodeError as error:
                    yield at, not_utf8(error)

    def _header(self, text: BinaryIO) -> tuple[list[str], int]:
        """Read the column names, and the byte where the first record begins."""
        line = text.readline()
        try:
            return header_names(_fields(line)), len(line)
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.file.uri}: the first line, which must name the columns, is not UTF-8") from error


def _fields(line: bytes) -> list[str]:
    return decoded(line).rstrip("\r\n").split("\t")
