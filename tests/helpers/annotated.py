"""Writes annotations of a finished run as `annotate` does, without an annotator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from flux_batch.output.annotations import AnnotationFolder
from flux_batch.output.metadata import parquet_bytes, unpack_metadata
from flux_batch.records import StoredFile
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store


def put_annotations(
    store: Store, name: str, columns: pa.Schema, values: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
) -> None:
    """Annotate every image with `values(metadata)`, or with nulls and a reason if that is None."""
    reason = [("error_type", pa.string()), ("error_message", pa.string())]
    schema = pa.schema([pa.field("key", pa.string(), nullable=False), *columns, *reason])
    run = SavedRun.open(store)
    folder = AnnotationFolder(run.folder, name)
    for commit in run.commits.read_all(sorted(run.commits.done())):
        file = f"{run.name(commit.shard)}.parquet"
        rows = []
        for row in unpack_metadata(store.read(f"metadata/{file}")):
            if row["status"] == "success":
                found = values(row)
                failed = {"error_type": "ValueError", "error_message": "cannot be judged"}
                rows.append({"key": row["key"], **(failed if found is None else found)})
        data = parquet_bytes(pa.Table.from_pylist(rows, schema))
        store.write(folder.file(commit.shard), data)
        of_images = [each for each in commit.files if each.path == f"metadata/{file}"]
        own = StoredFile(path=folder.file(commit.shard), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        failed = sum(row.get("error_type") is not None for row in rows)
        store.delete(folder.commits.key(commit.shard))
        folder.commits.put(replace(commit, num_images=len(rows), num_failed=failed, files=(own, *of_images)))
