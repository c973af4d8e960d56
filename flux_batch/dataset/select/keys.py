"""Lists of keys, as the gallery or other programs write them: text, CSV, JSON, Parquet."""

from __future__ import annotations

import csv
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.errors import JobError, NotFound, one_line
from flux_batch.storage.store import Store


def read_keys(uri: str) -> list[str]:
    """Read a list of keys: lines of text; the column `key` of CSV or Parquet; a JSON list of keys or of objects.

    Raises: JobError if there is no such file or it holds no keys.
    """
    folder, _, name = uri.rpartition("/")
    if not folder:
        folder = "/" if uri.startswith("/") else "."
    try:
        data = Store(folder).read(name)
    except NotFound as error:
        raise JobError(f"--keys {uri}: there is no such file") from error
    try:
        keys = _keys(name.rpartition(".")[2].lower(), data)
    except (ValueError, KeyError, TypeError, pa.ArrowException, csv.Error) as error:
        raise JobError(f"--keys {uri}: cannot be read as a list of keys: {one_line(error)}") from error
    if not keys or not all(isinstance(key, str) for key in keys):
        raise JobError(f"--keys {uri}: has no keys; it must have one a line, or a column key")
    return keys


def _keys(suffix: str, data: bytes) -> list[Any]:
    if suffix == "parquet":
        return list(pq.ParquetFile(pa.BufferReader(data)).read(["key"])["key"].to_pylist())
    text = data.decode("utf-8-sig")
    if suffix == "json":
        return [each["key"] if isinstance(each, dict) else each for each in json.loads(text)]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if suffix == "csv" and lines and "key" in next(csv.reader(lines[:1])):
        return [row["key"] for row in csv.DictReader(lines)]
    return lines
