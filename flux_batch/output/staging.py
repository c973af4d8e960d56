"""The staging area: finished images of a shard that is not committed yet, for the next attempt at it.

    _run/staging/NNNNN/ID.parquet            the images of one batch, failed ones included
    _run/staging/NNNNN/try-LABEL-ID.json     the mark that a batch or image was started; a lost worker leaves it behind

Each writer has names of its own, so no writer overwrites another's objects. Staging only saves time: everything in it
may be removed at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.config.schema import QUALITY_COLUMNS
from flux_batch.errors import NotFound
from flux_batch.output.metadata import RECORD_SCHEMA, parquet_table
from flux_batch.output.paths import STAGING, RunFolder, number_in

_SCHEMA = pa.schema(
    [("key", pa.string()), ("record", pa.string()), ("data", pa.binary()), ("digest", pa.binary(32))],
    metadata={"version": "1"},
)
_SOURCES = pa.field("sources", pa.list_(pa.binary()))
_MARK = "try-"
_REPAIR = "repair-"
_RETRY = "retry-"
# The fields of a record, without the file name and those that follow from the bytes (empty for a failed image).
_RECORD_FIELDS = [name for name in RECORD_SCHEMA.names if name not in {"status", "file_name", "sha256", "bytes"}]


@dataclass(frozen=True, slots=True)
class StagedImage:
    """One requested image: its encoded bytes, empty if it failed, and the fields of its record.

    sources: the encoded bytes of its source images, if the job writes them.
    """

    key: str
    record: Mapping[str, Any]
    data: bytes
    sources: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class _Staged:
    """The staging folder of a shard: names of objects, and by label the number of marks that were left behind."""

    objects: frozenset[str] = frozenset()
    tries: Counter[str] = field(default_factory=Counter)


def staged_record(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields to stage, of a record or of a row of the metadata."""
    return {name: fields[name] for name in _RECORD_FIELDS if fields.get(name) is not None}


def is_judged(row: Mapping[str, Any]) -> bool:
    """Return whether a row of the metadata has the columns of a run with `quality`."""
    return all(name in row for name in QUALITY_COLUMNS) and isinstance(row["score"], float | None)


@dataclass(frozen=True)
class Staging:
    """The staging folders of a run; those of annotations have a `folder` of their own."""

    run: RunFolder
    folder: str = STAGING

    def put(self, shard: int, images: Sequence[StagedImage], *, is_repair: bool = False, retry: int = 0) -> str:
        """Store the images of a batch as one object. Returns: its name in the folder of the shard.

        is_repair: these are the good images of a damaged shard, see `is_repair`. retry: see `retry_of`.
        """
        prefix = _REPAIR if is_repair else f"{_RETRY}{retry}-" if retry else ""
        name = f"{prefix}{uuid.uuid4().hex}.parquet"
        self.run.store.write(f"{self._folder(shard)}/{name}", _pack(images))
        return name

    def list(self, shard: int) -> _Staged:
        """List the staged objects and marks of a shard by one request."""
        names = [key.rpartition("/")[2] for key in self.run.store.list(self._folder(shard))]
        tries = Counter(label for name in names if (label := _label_of_mark(name)))
        return _Staged(frozenset(name for name in names if name.endswith(".parquet")), tries)

    def read(self, shard: int, name: str) -> Sequence[StagedImage]:
        """Read the images of an object; none if it is gone or damaged at any byte.

        It is all or nothing, so that the missing images are made in the same batch as without the damage.
        """
        try:
            return _unpack(self.run.store.read(f"{self._folder(shard)}/{name}"))
        except NotFound:
            return ()

    def mark_started(self, shard: int, label: str, worker: str) -> str:
        """Write the mark that a batch or image is started. Returns: the mark, for `unmark`."""
        key = f"{self._folder(shard)}/{_MARK}{label}-{uuid.uuid4().hex}.json"
        self.run.store.write(key, json.dumps({"worker": worker}).encode())
        return key

    def unmark(self, mark: str) -> None:
        """Remove a mark after the worker has survived the batch or image. Safe to call twice."""
        self.run.store.delete(mark)

    def forget_losses(self, shard: int, labels: Collection[str]) -> None:
        """Remove the marks of these batches or images that lost workers left behind. Safe to call twice."""
        names = (key.rpartition("/")[2] for key in self.run.store.list(self._folder(shard)))
        self.discard(shard, [name for name in names if _label_of_mark(name) in labels])

    def remove(self, shard: int) -> None:
        """Remove everything that is staged of a shard. Safe to call twice."""
        self.run.store.delete_many(self.run.store.list(self._folder(shard)))

    def discard(self, shard: int, names: Iterable[str]) -> None:
        """Remove objects of a shard by their names. Safe to call twice."""
        self.run.store.delete_many([f"{self._folder(shard)}/{name}" for name in sorted(names)])

    def clear(self) -> None:
        """Remove everything that is staged when a run is complete: a kill before `remove` leaves some."""
        self.run.store.delete_folder(self.folder)

    def shards(self) -> set[int]:
        """Return the shards with staged objects, by listing the whole staging area once."""
        parts = (key.removeprefix(f"{self.folder}/").split("/") for key in self.run.store.list(self.folder))
        folders = {part[0] for part in parts if len(part) == 2}
        return {shard for folder in folders if (shard := number_in(folder)) is not None}

    def _folder(self, shard: int) -> str:
        return f"{self.folder}/{self.run.shard_name(shard)}"


def _label_of_mark(name: str) -> str | None:
    """Return the batch or image of a mark; None for another object."""
    return name.removeprefix(_MARK).rpartition("-")[0] if name.startswith(_MARK) else None


def is_repair(name: str) -> bool:
    """Return whether a staged object holds the good images of a damaged shard.

    The missing images of the shard were once made in batches together with these.
    """
    return name.startswith(_REPAIR)


def retry_of(name: str) -> int:
    """Return the number of the retry whose images a staged object holds; 0 for the first try."""
    return int(name.removeprefix(_RETRY).partition("-")[0]) if name.startswith(_RETRY) else 0


def _pack(images: Sequence[StagedImage]) -> bytes:
    rows = [
        {
            **{"key": one.key, "record": record, "data": one.data, "sources": one.sources},
            "digest": _digest(one.key, record, one.data, *one.sources),
        }
        for one in images
        for record in [json.dumps(one.record, ensure_ascii=False)]
    ]
    schema = _SCHEMA.append(_SOURCES) if any(one.sources for one in images) else _SCHEMA
    buffer = io.BytesIO()
    # The images are already compressed.
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="none")
    return buffer.getvalue()


def _unpack(data: bytes) -> list[StagedImage]:
    try:
        rows = parquet_table(data).to_pylist()
        sources = [tuple(row.get("sources") or ()) for row in rows]
        for row, some in zip(rows, sources, strict=True):
            if row["digest"] != _digest(row["key"], row["record"], row["data"], *some):
                return []
        return [
            StagedImage(row["key"], json.loads(row["record"]), row["data"], some)
            for row, some in zip(rows, sources, strict=True)
        ]
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError):  # damaged Parquet may raise any of these
        return []


def _digest(key: str, record: str, data: bytes, *sources: bytes) -> bytes:
    digest = hashlib.sha256(data)
    digest.update(f"\0{key}\0{record}".encode())
    for source in sources:
        digest.update(hashlib.sha256(source).digest())
    return digest.digest()
