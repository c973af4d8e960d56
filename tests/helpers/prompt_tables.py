"""Reads prompt files as workers do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flux_batch.prompts.formats.open import open_table
from flux_batch.prompts.formats.table import BadRow, Row


def read_all(path: Path, num_rows: int, columns: Sequence[str] = ("prompt", "n")) -> list[Row | BadRow]:
    """Read a file range by range, from the last range to the first, as workers do in any order."""
    ranges = list(open_table(str(path), {}).split(num_rows))
    assert [rows.start for rows in ranges] == [index * num_rows for index in range(len(ranges))]
    assert all(rows.num_rows == num_rows for rows in ranges[:-1])
    found = [list(open_table(str(path), {}).stream(rows, set(columns))) for rows in reversed(ranges)]
    assert [len(part) for part in reversed(found)] == [rows.num_rows for rows in ranges]
    return [row for part in reversed(found) for row in part]
