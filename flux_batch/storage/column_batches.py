"""A batch of somebody's data pipeline, in columns of NumPy or of Arrow: rows out of it, columns onto it.

Knows columns and their types; does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from flux_batch.errors import SourceError

# What Ray Data gives by the batch formats "numpy" and "pyarrow".
Batch: TypeAlias = dict[str, Any] | pa.Table


def column_names(batch: Batch) -> list[str]:
    """Name the columns. Raises: SourceError for anything but a batch in columns."""
    if isinstance(batch, pa.Table):
        return list(batch.column_names)
    if isinstance(batch, dict):
        return list(batch)
    raise SourceError(f"a batch is a {type(batch).__name__}: take batch_format 'numpy' or 'pyarrow'")


def rows_of(batch: Batch, names: Collection[str]) -> list[dict[str, Any]]:
    """Give the rows of a batch in plain Python values, with those of the columns `names` that there are.

    A NaN of NumPy is None, since NumPy has no other way to leave out a number.
    """
    found = [name for name in column_names(batch) if name in names]
    if isinstance(batch, pa.Table):
        return [dict(row) for row in batch.select(found).to_pylist()]
    columns = [_plain(batch[name]) for name in found]
    return [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]


def extended(batch: Batch, rows: Sequence[int], columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> Batch:
    """Give the rows `rows` of a batch with further columns, in the place of any of their names; types as in `schema`.

    Those of a batch of NumPy are of Python objects, since they may hold None.
    """
    if isinstance(batch, pa.Table):
        table = batch.drop_columns([name for name in batch.column_names if name in columns]).take(pa.array(rows))
        for name, values in columns.items():
            table = table.append_column(schema.field(name), [pa.array(values, schema.field(name).type)])
        return table
    kept = {name: np.asarray(values)[list(rows)] for name, values in batch.items() if name not in columns}
    return kept | {name: _objects(values) for name, values in columns.items()}


def _plain(values: Any) -> list[Any]:
    array = np.asarray(values)
    return [None if isinstance(value, float) and value != value else value for value in array.tolist()]


def _objects(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
