"""The tables of a run: the metadata and annotations of its committed shards, read by column."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.errors import DamagedObject, one_line
from flux_batch.output.annotations import AnnotationFolder, annotation_names
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.paths import metadata_file
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.passthrough import portable

_READERS = 16


def committed_shards(run: SavedRun) -> list[int]:
    """Return the committed shards of the plan, in order."""
    return sorted(shard for shard in run.commits.done() if shard < run.num_shards)


def annotated_shards(run: SavedRun) -> dict[str, set[int]]:
    """Return the shards with committed annotations, by the name of the annotation."""
    return {name: AnnotationFolder(run.folder, name).commits.done() for name in annotation_names(run.folder)}


def read_tables(run: SavedRun, shards: Iterable[int], annotation: str | None, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield columns of the metadata or an annotation: a table for each shard, in order, with few in memory.

    Raises: NotFound; DamagedObject for a file that cannot be read or has other columns.
    """
    left = iter(shards)
    with ThreadPoolExecutor(_READERS, "columns") as pool:
        waiting: deque[Future[pa.Table]] = deque()
        for shard in islice(left, 2 * _READERS):
            waiting.append(pool.submit(_read, run, annotation, shard, schema))
        while waiting:
            yield waiting.popleft().result()
            for shard in islice(left, 1):
                waiting.append(pool.submit(_read, run, annotation, shard, schema))


def read_schema(run: SavedRun, annotation: str | None, shard: int) -> pa.Schema:
    """Read the schema of the metadata or an annotation, with portable types.

    Raises: the errors of `read_tables`.
    """
    key = _file(run, annotation, shard)
    data = run.store.read(key)
    try:
        schema = pq.read_schema(io.BytesIO(data)).remove_metadata()
        return pa.schema([field.with_type(portable(field.type)) for field in schema])
    except DECODE_ERRORS as error:
        raise DamagedObject(f"{run.store.url(key)}: cannot be read: {one_line(error)}") from error


def _read(run: SavedRun, annotation: str | None, shard: int, schema: pa.Schema) -> pa.Table:
    key = _file(run, annotation, shard)
    return table_of(run.store.read(key), schema, run.store.url(key))


def table_of(data: bytes, schema: pa.Schema, url: str) -> pa.Table:
    """Return columns of a Parquet file. Raises: DamagedObject, with its `url`, if it is unreadable or lacks them."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            return file.read(schema.names, use_threads=False).select(schema.names).cast(schema)
    except DECODE_ERRORS as error:
        raise DamagedObject(f"{url}: cannot be read: {one_line(error)}") from error


def _file(run: SavedRun, annotation: str | None, shard: int) -> str:
    if annotation is None:
        return metadata_file(run.name(shard))
    return AnnotationFolder(run.folder, annotation).file(shard)
