"""JSON Lines, also called NDJSON: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from flux_batch.prompts.formats.lines import LineTable, decoded, lines
from flux_batch.prompts.formats.table import BadRow, Row, check_whole_characters


class JsonLinesTable(LineTable):
    """A file with one JSON object per line; blank lines are skipped."""

    def schema(self, num_rows: int | None = None) -> pa.Schema:
        """Return the columns of the first `num_rows` rows, or of the whole file; mixed types become JSON text."""
        with self.file.open_text() as text:
            return schema_of_rows(row for _, row in islice(self.records(text), num_rows))

    def records(self, text: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield the object of each line."""
        for at, line in lines(text, offset):
            if line.strip():
                yield at, _row(line)


def _row(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(decoded(line))
        if b"\\u" in line:
            check_whole_characters(row)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON: {error}")
    return row if isinstance(row, dict) else BadRow("not a JSON object")


def schema_of_rows(rows: Iterable[Row | BadRow]) -> pa.Schema:
    """Return the columns of JSON objects, in the order in which they appear."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        if isinstance(row, dict):
            for name, value in row.items():
                kinds.setdefault(name, set()).add(_kind(value))
    return pa.schema([(name, _arrow_type(found - {type(None)})) for name, found in kinds.items()])


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
    return pa.string() if kinds else pa.null()  # null, since another file may have values of any type
