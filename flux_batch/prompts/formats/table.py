"""The protocol of a prompts file in any format; it does not know the meaning of columns.

A row that cannot be parsed is a BadRow at its position, so that the other rows of the file can be used.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be parsed, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class RowRange:
    """The rows [start, start + num_rows) of a file.

    `offset` is the position of the first one, as its format defines it, e.g. a byte of the text; 0 at the start. `line`
    is the line of the first one, from 1; 0 if rows have no lines, or in old plans.
    """

    start: int
    num_rows: int
    offset: int = 0
    line: int = 0


def check_whole_characters(value: Any) -> None:
    """Raise ValueError for a lone surrogate; JSON and templates can produce one, files cannot hold it."""
    if isinstance(value, list | dict) or (isinstance(value, str) and not value.isascii()):
        json.dumps(value, ensure_ascii=False, default=lambda other: None).encode()


def ranges_of(total: int, num_rows: int) -> list[RowRange]:
    """Return ranges of `num_rows` that cover `total` rows; the last may be shorter."""
    return [RowRange(start, min(num_rows, total - start)) for start in range(0, total, num_rows)]


def ranges_from(starts: Iterable[tuple[int, int]], num_rows: int, start: int = 0) -> Iterator[RowRange]:
    """Yield ranges of `num_rows` rows; `starts` has the byte and line of each row; the last may be shorter."""
    places = iter(starts)
    for offset, line in places:
        count = 1 + sum(1 for _ in islice(places, num_rows - 1))
        yield RowRange(start, count, offset, line)
        start += count


class Table(Protocol):
    """A prompts file, opened for reading."""

    def schema(self) -> pa.Schema:
        """Return all columns in order, with the types of their values; a name may occur twice."""
        ...

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter."""
        ...

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range from `split` one by one; columns other than `columns` may be left out."""
        ...
