"""Annotations of a finished run, written as `annotate` leaves them, without an annotator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from flux_batch.output.metadata import parquet_bytes, unpack_metadata
from flux_batch.storage.store import Store


def put_annotations(
    store: Store, name: str, columns: pa.Schema, values: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
) -> None:
    """Annotate every made image: `values` of its metadata, or nulls with a reason where it returns None."""
    reason = [("error_type", pa.string()), ("error_message", pa.string())]
    schema = pa.schema([pa.field("key", pa.string(), nullable=False), *columns, *reason])
    for file in store.children("metadata"):
        rows = []
        for row in unpack_metadata(store.read(f"metadata/{file}")):
            if row["status"] == "success":
                found = values(row)
                failed = {"error_type": "ValueError", "error_message": "cannot be judged"}
                rows.append({"key": row["key"], **(failed if found is None else found)})
        store.write(f"annotations/{name}/{file}", parquet_bytes(pa.Table.from_pylist(rows, schema)))
        store.write(f"_run/annotations/{name}/commits/{file.replace('.parquet', '.json')}", b"{}")
