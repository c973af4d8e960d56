from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.output.metadata import (
    RECORD_SCHEMA,
    pack_failures,
    pack_metadata,
    parquet_bytes,
    passthrough_name,
    unpack_metadata,
)
from helpers.image_records import COLUMNS, PASSTHROUGH, PROMPTS, make_record


def test_metadata_keeps_every_value_as_it_was() -> None:
    records = [make_record(row, prompt) for row, prompt in enumerate(PROMPTS)]

    data = pack_metadata(records, PASSTHROUGH)

    rows = unpack_metadata(data)
    assert data == pack_metadata(records, PASSTHROUGH)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert list(rows[0]) == [*RECORD_SCHEMA.names, *(passthrough_name(name) for name in COLUMNS)]
    for name, (_, values) in COLUMNS.items():
        if name != "number":
            assert [row[passthrough_name(name)] for row in rows] == values, name
    assert pq.read_schema(io.BytesIO(data)).field("moment").type == pa.timestamp("us", "UTC")


def test_failures_are_the_failed_rows_of_the_metadata() -> None:
    records = [make_record(row, prompt) for row, prompt in enumerate(PROMPTS)]
    records[2] = replace(records[2], status="failed", error_type="RowError", error_message="p.csv:2: why")

    failures = pack_failures(pack_metadata(records, PASSTHROUGH))

    assert failures is not None
    assert [(row["key"], row["error_message"]) for row in unpack_metadata(failures)] == [("000000002", "p.csv:2: why")]
    assert pack_failures(pack_metadata(records[:2], PASSTHROUGH)) is None


def test_values_of_other_types_fit_the_columns_they_were_merged_into() -> None:
    schema = pa.schema([("text", pa.string()), ("number", pa.float64())])
    record = replace(make_record(0, "p"), passthrough={"text": {"a": ["ü", None]}, "number": 2**60 + 1})

    (row,) = unpack_metadata(pack_metadata([record], schema))

    assert row["text"] == '{"a": ["ü", null]}'
    assert row["number"] == float(2**60)


def test_no_passthrough_column_is_taken_for_more_images() -> None:
    names = ["file_name", "file_names", "source_file_name", "ref_file_names", "image_file_name", "source_file_name_"]

    assert [passthrough_name(name) for name in names] == [f"{name}_" for name in names]
    assert passthrough_name("profile_name") == "profile_name"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux lists them")
def test_a_table_is_read_without_threads_that_a_process_would_die_of_at_its_end(tmp_path: Path) -> None:
    """At exit, an Arrow thread that reads a Python file object waits for the interpreter, which is gone."""
    (tmp_path / "rows.parquet").write_bytes(parquet_bytes(pa.table({"key": ["a"] * 1000})))
    program = """
import os, sys
from flux_batch.output.metadata import parquet_table
data = open(sys.argv[1], "rb").read()
before = len(os.listdir("/proc/self/task"))
assert parquet_table(data).num_rows == 1000
print(len(os.listdir("/proc/self/task")) - before, "pyarrow.dataset" in sys.modules)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "rows.parquet")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["0", "False"]
