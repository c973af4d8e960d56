"""A JSON file with one value: an array of objects or texts, or an object of columns."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import pyarrow as pa

from flux_batch.errors import SourceError
from flux_batch.prompts.formats.file import PromptBytes
from flux_batch.prompts.formats.json_lines import schema_of_rows
from flux_batch.prompts.formats.table import BadRow, Row, RowRange, check_whole_characters, ranges_of

# Column names that distinguish a table of prompts from other tables in the same file.
_CAPTIONS = ("prompt", "caption", "text")
# A limit, since every worker reads the whole file.
_MAX_BYTES = 1 << 28


class JsonTable:
    """A JSON file, which is read once as a whole."""

    def __init__(self, file: PromptBytes) -> None:
        self._file = file

    def schema(self) -> pa.Schema:
        """Return the columns; mixed types become JSON text."""
        return schema_of_rows(self._rows)

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter."""
        yield from ranges_of(len(self._rows), num_rows)

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range one by one."""
        yield from self._rows[rows.start : rows.start + rows.num_rows]

    @property
    def is_one_row(self) -> bool:
        """True if the file holds a single row."""
        return len(self._rows) == 1

    @cached_property
    def _rows(self) -> list[Row | BadRow]:
        with self._file.open_text() as text:
            data = text.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise SourceError(f"{self._file.uri}: a JSON file of more than 256 MiB; save it as JSON Lines (.jsonl)")
        if not data.strip():
            return []
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self._file.uri}: not valid JSON: {error}") from error
        found = _items(value)
        if found is None:
            names = [name for name, column in value.items() if _is_table(column)] if isinstance(value, dict) else []
            what = (
                f"several tables: {', '.join(names)}; save one of them by itself"
                if len(names) > 1
                else "no table; must be an array of objects or texts, or an object of columns"
            )
            raise SourceError(f"{self._file.uri}: holds {what}")
        has_escapes = b"\\u" in data
        return [_row(item, has_escapes) for item in found]


def _items(value: Any) -> list[Any] | None:
    """Return the rows of a JSON value, of any type; None if it is not a table."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        return None
    columns = list(value.values())
    tables: list[list[Any]] = [column for column in columns if _is_table(column)]
    are_columns = all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1
    if are_columns and len(tables) < len(columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if len(tables) > 1:  # COCO has its captions beside images and licences
        tables = [table for table in tables if any(isinstance(table[0].get(name), str) for name in _CAPTIONS)]
    if len(tables) == 1:  # an array of objects beside information about it
        return tables[0]
    if all(isinstance(column, dict) for column in columns) and len({tuple(column) for column in columns}) == 1:
        return [{name: column[key] for name, column in value.items()} for key in columns[0]]  # as pandas writes it
    return [value] if isinstance(value.get("prompt"), str) else None


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _row(item: Any, has_escapes: bool) -> Row | BadRow:
    if has_escapes:
        try:
            check_whole_characters(item)
        except ValueError as error:
            return BadRow(f"not valid JSON: {error}")
    if isinstance(item, str):
        return {"prompt": item}
    return item if isinstance(item, dict) else BadRow("neither a JSON object nor a text")
