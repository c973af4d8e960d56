"""The prompt sets of the benchmarks: any number of rows in Parquet files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_PER_GROUP = 65_536


def write_prompts(folder: Path, make_row: Callable[[int], dict[str, Any]], num_rows: int, num_files: int) -> list[Path]:
    """Write `make_row` of each number to files of about the same size, a row group at a time; return their paths."""
    schema = pa.Table.from_pylist([make_row(0)]).schema
    bounds = [num_rows * number // num_files for number in range(num_files + 1)]
    paths = [folder / f"{number:05}.parquet" for number in range(num_files)]
    for path, (start, end) in zip(paths, pairwise(bounds), strict=True):
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(start, end, _ROWS_PER_GROUP):
                rows = [make_row(number) for number in range(first, min(first + _ROWS_PER_GROUP, end))]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return paths
