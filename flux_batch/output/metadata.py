"""The metadata of a shard: one row for every requested image, failed ones included, in the order of the prompts."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flux_batch.config.schema import QUALITY_COLUMNS, SOURCE_COLUMNS, JobConfig, source_name
from flux_batch.records import IMAGE_COLUMNS, WEIGHTED_COLUMNS, ImageRecord
from flux_batch.sampling_params import SAMPLING_FIELDS
from flux_batch.storage.passthrough import as_json, passthrough_of, values_of

_COLUMN_TYPES = {int: pa.int32(), float: pa.float64(), str: pa.string()}
RECORD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        *[(name, _COLUMN_TYPES[field.type]) for name, field in SAMPLING_FIELDS.items() if name != "negative_prompt"],
        *[(name, pa.string()) for name in IMAGE_COLUMNS],
        *[(f"{name}_scale", pa.string()) for name in WEIGHTED_COLUMNS],
        ("lora", pa.string()),
        ("lora_scale", pa.float64()),
        ("tile_size", pa.int32()),
        ("clip_truncated", pa.bool_()),
        ("t5_truncated", pa.bool_()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("quantization", pa.string(), nullable=False),
        pa.field("step_cache", pa.float64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("file_name", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
    ]
)
QUALITY_FIELDS = tuple(
    pa.field(name, kind) for name, kind in zip(QUALITY_COLUMNS, (pa.int32(), pa.float64(), pa.bool_()), strict=True)
)
_SOURCES = tuple(pa.field(name, pa.string()) for name in SOURCE_COLUMNS)
# Columns that are useless for an image that is stored beside its record: its status and its place are evident.
_NOT_OF_SAMPLES = {"status", "error_type", "error_message", "file_name"}
# Name endings for which `datasets` opens a column's values as files: packaged_modules/folder_based_builder.py.
_NAMES_OF_FILES = ("_file_name", "_file_names")


def columns_of_job(passthrough: pa.Schema, config: JobConfig) -> pa.Schema:
    """Return the columns that follow those of every record: passthrough columns, and those that a job adds.

    A job adds the columns of `quality` and the hashes of the source images.
    """
    return pa.schema(
        [*passthrough, *(QUALITY_FIELDS if config.quality else ()), *(_SOURCES if config.output.sources else ())]
    )


def pack_metadata(records: Iterable[ImageRecord], passthrough: pa.Schema) -> bytes:
    """Return records as the bytes of a Parquet file, in the given order."""
    schema = pa.schema([*RECORD_SCHEMA, *_renamed(passthrough)])
    return parquet_bytes(pa.Table.from_pylist([record_row(record, passthrough) for record in records], schema))


def pack_failures(metadata: bytes) -> bytes | None:
    """Return the failed rows of a shard's metadata as the bytes of a Parquet file; None if there are none."""
    table = parquet_table(metadata)
    failed = table.filter(pc.field("status") == "failed")
    return parquet_bytes(failed) if failed.num_rows else None


def unpack_metadata(data: bytes) -> list[dict[str, Any]]:
    """Read the rows that `pack_metadata` wrote; a time outside the range of Python's types becomes text."""
    table = parquet_table(data)
    try:
        return table.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        return _rows(table, _values_or_texts)


def unpack_records(data: bytes) -> list[dict[str, Any]]:
    """Read the rows that `pack_metadata` wrote, to write them again; times outside Python's range are Arrow scalars."""
    return _rows(parquet_table(data), values_of)


def _rows(table: pa.Table, values: Callable[[pa.ChunkedArray], list[Any]]) -> list[dict[str, Any]]:
    columns = [values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values_or_texts(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]


def record_row(record: ImageRecord, passthrough: pa.Schema) -> dict[str, Any]:
    """Return a record as a row of a table, in the order of the columns."""
    # asdict would copy every value, and Arrow's times of the year 10000 cannot be copied.
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    values |= asdict(record.sampling) if record.sampling else dict.fromkeys(SAMPLING_FIELDS)
    extra = passthrough_of(record.passthrough, passthrough)
    row = {name: values[name] for name in RECORD_SCHEMA.names}
    return row | {passthrough_name(name): value for name, value in extra.items()}


def sample_fields(record: ImageRecord, passthrough: pa.Schema) -> dict[str, Any]:
    """Return the fields of an image for JSON: a fixed set of keys and no nulls.

    Loaders infer types from a few samples, so a null becomes the empty value of its type. The metadata keeps the null.
    """
    row = record_row(record, passthrough)
    for field in [*RECORD_SCHEMA, *_renamed(passthrough)]:
        row[field.name] = as_json(row[field.name], field.type)
    return {name: value for name, value in row.items() if name not in _NOT_OF_SAMPLES}


def sample_columns(passthrough: pa.Schema) -> list[pa.Field]:
    """Return the columns of an image that is stored beside its record."""
    return [field for field in RECORD_SCHEMA if field.name not in _NOT_OF_SAMPLES] + _renamed(passthrough)


def passthrough_name(name: str) -> str:
    """Return the name of a passthrough column in the metadata: with `_` appended if the name is reserved.

    Reserved are our columns, and `..._file_name`, which Hugging Face data sets read as further images. `key_` gets a
    `_` too, so that it does not collide with a renamed `key`.
    """
    plain = name.rstrip("_")
    is_taken = plain in {*RECORD_SCHEMA.names, "image"} or f"_{plain}".endswith(_NAMES_OF_FILES)
    return f"{name}_" if is_taken else name


def source_fields(sources: Iterable[bytes]) -> dict[str, str]:
    """Return the column with the hashes of an image's source images; {} without any."""
    digests = [hashlib.sha256(source).hexdigest() for source in sources]
    return dict.fromkeys(SOURCE_COLUMNS, ", ".join(digests)) if digests else {}


def source_digests(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the recorded hashes of an image's source images by name; {} if the run writes none."""
    digests = row.get(SOURCE_COLUMNS[0])
    several = digests.split(", ") if isinstance(digests, str) and digests else []
    return {source_name(number): digest for number, digest in enumerate(several)}


def parquet_table(data: bytes) -> pa.Table:
    """Return the table of a Parquet file with these bytes.

    Threads of Arrow would read a Python file object, and a process that exits while one of them waits for the
    interpreter aborts. pyarrow.parquet.read_table imports modules for a third of a second.
    """
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(use_threads=False)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _renamed(passthrough: pa.Schema) -> list[pa.Field]:
    return [field.with_name(passthrough_name(field.name)).with_nullable(True) for field in passthrough]
