"""The annotations of a run: columns about its images, added later, with their own files and commits.

    annotations/NAME/NNNNN.parquet              one row for every image of a shard, by `key`
    _run/annotations/NAME/annotator.json        the annotator: its name, options, version and columns
    _run/annotations/NAME/commits/NNNNN.json    the commit of such a file
    _run/annotations/NAME/staging/NNNNN/        finished rows of a shard that is not annotated yet

The protocol is that of images (commits.py): rows are staged, then the file is put if absent, then the commit. A commit
names two files: the annotations, and the metadata of the images that they describe. No file of the images is changed.
When a shard is reverted, its annotations are removed too, and their rows are staged again. Files that a killed pass did
not commit are removed by the next pass, for which their rows are still staged.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from flux_batch.errors import FluxBatchError, NotFound, StoreError
from flux_batch.output.commits import Commits, parse_commit
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.metadata import parquet_bytes, parquet_table, unpack_metadata
from flux_batch.output.paths import ANNOTATING, ANNOTATIONS, RunFolder, metadata_file, number_in
from flux_batch.output.staging import StagedImage, Staging

# The columns that every annotation has: the key of the image, and the error if there are no values.
_KEY = pa.field("key", pa.string(), nullable=False)
_REASON = (pa.field("error_type", pa.string()), pa.field("error_message", pa.string()))


class ImageDamaged(FluxBatchError):
    """An image is missing, or its bytes differ from those in the metadata."""


@dataclass(frozen=True)
class AnnotationFolder:
    """The annotations of one name."""

    run: RunFolder
    name: str

    @cached_property
    def commits(self) -> Commits:
        """The commits of its files."""
        return Commits(self.run, f"{ANNOTATING}/{self.name}/commits")

    @cached_property
    def staging(self) -> Staging:
        """The rows of shards that are not committed."""
        return Staging(self.run, f"{ANNOTATING}/{self.name}/staging")

    @property
    def identity(self) -> str:
        """The name of the object that describes the annotator."""
        return f"{ANNOTATING}/{self.name}/annotator.json"

    def file(self, shard: int) -> str:
        """Return the name of the file of a shard."""
        return f"{ANNOTATIONS}/{self.name}/{self.run.shard_name(shard)}.parquet"

    def read(self, shard: int) -> pa.Table:
        """Read the annotations of a committed shard. Raises: NotFound."""
        return parquet_table(self.run.store.read(self.file(shard)))

    def revert(self, shard: int, *, keep_failed: bool = True) -> None:
        """Remove the commit and the file of a shard; needs the lease.

        Its rows are staged for the next attempt and replace those already staged. keep_failed: rows without values are
        staged too, except those of damaged images, which may be repaired.
        """
        if self.run.store.exists(self.commits.key(shard)):
            rows = self._good_rows(shard)
            self.staging.remove(shard)  # a pass that was killed after the commit leaves all rows, also failed ones
            if some := [one for one, is_failed in rows if keep_failed or not is_failed]:
                self.staging.put(shard, some)
        self.run.store.delete(self.commits.key(shard))
        self.run.store.delete(self.file(shard))

    def remove(self) -> None:
        """Remove everything of this name; needs the lease. Safe to call twice.

        The identity is removed last: after a kill it still describes the remaining files.
        """
        of_name = f"{ANNOTATING}/{self.name}"
        for folder in (self.commits.folder, f"{ANNOTATIONS}/{self.name}", self.staging.folder, of_name):
            self.run.store.delete_folder(folder)

    def remove_uncommitted(self) -> None:
        """Remove files without a commit; the caller holds the lease.

        A killed pass or revert leaves them. The next pass would adopt them like files of a worker that came first,
        whatever they contain; the rows of a pass are staged anyway. A worker of a former driver may commit its file
        meanwhile: such a commit is reverted.
        """
        store, done = self.run.store, self.commits.done()
        for name in store.children(f"{ANNOTATIONS}/{self.name}"):
            shard = number_in(name, ".parquet")
            if shard is None or shard in done or store.exists(self.commits.key(shard)):  # a listing may be late
                continue
            store.delete(f"{ANNOTATIONS}/{self.name}/{name}")
            if store.exists(self.commits.key(shard)):
                self.revert(shard)

    def remove_staged_failures(self) -> None:
        """Remove the staged rows without values; needs the lease. All other rows stay staged."""
        for shard in sorted(self.staging.shards()):
            for name in sorted(self.staging.list(shard).objects):
                rows = self.staging.read(shard, name)
                good = [row for row in rows if not _staged_values(row).to_pylist()[0]["error_type"]]
                if len(good) < len(rows):
                    self._replace_staged(shard, name, rows, good)

    def _replace_staged(self, shard: int, name: str, rows: Sequence[StagedImage], good: Sequence[StagedImage]) -> None:
        """Replace a staged object by one with its good rows only."""
        # Marks of lost workers would make the removed rows fail again.
        self.staging.forget_losses(shard, {row.key for row in rows} - {row.key for row in good})
        if good:
            self.staging.put(shard, good)
        self.staging.discard(shard, [name])

    def _good_rows(self, shard: int) -> list[tuple[StagedImage, bool]]:
        """Return the rows of a shard to stage, each with whether it lacks values.

        There are none unless file and metadata have the bytes that the commit names: the rows would describe others.
        """
        store, path, metadata = self.run.store, self.file(shard), metadata_file(self.run.shard_name(shard))
        try:
            commit = parse_commit(store.read(self.commits.key(shard)))
            data = {key: store.read(key) for key in (path, metadata)}
            hashes = {file.path: file.sha256 for file in commit.files}
            if any(hashes.get(key) != hashlib.sha256(own).hexdigest() for key, own in data.items()):
                return []
            table, records = parquet_table(data[path]), unpack_metadata(data[metadata])
        except NotFound:
            return []
        except StoreError:
            raise
        except DECODE_ERRORS:  # damaged: all rows of the shard are made again
            return []
        digests = {record["key"]: record["sha256"] for record in records}
        rows = [
            row for row in table.to_pylist() if row["key"] in digests and row["error_type"] != ImageDamaged.__name__
        ]
        return [(staged_row(row, table.schema, digests[row["key"]]), bool(row["error_type"])) for row in rows]


def annotation_names(run: RunFolder) -> list[str]:
    """Return the names of a run's annotations, sorted."""
    return sorted(name for name, size in run.store.children(ANNOTATING).items() if size is None)


def annotation_schema(columns: pa.Schema) -> pa.Schema:
    """Return the columns of an annotation's file, from those of its annotator."""
    return pa.schema([_KEY, *(field.with_nullable(True) for field in columns), *_REASON])


def pack_annotations(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Return rows as the bytes of a Parquet file, in the order given."""
    return parquet_bytes(pa.Table.from_pylist(rows, schema))


def unpack_annotations(data: bytes) -> list[dict[str, Any]]:
    """Read the rows that `pack_annotations` wrote."""
    return parquet_table(data).to_pylist()  # type: ignore[no-any-return]


def staged_row(row: Mapping[str, Any], schema: pa.Schema, sha256: str) -> StagedImage:
    """Return a row to stage; `sha256` is the hash of its image."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema.remove_metadata()) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row], schema.remove_metadata()))
    return StagedImage(row["key"], {"sha256": sha256}, sink.getvalue())


def unpack_staged_row(staged: StagedImage, schema: pa.Schema) -> dict[str, Any] | None:
    """Return a row that was staged; None if its columns are not those of `schema`."""
    table = _staged_values(staged)
    return dict(table.to_pylist()[0]) if table.schema.equals(schema.remove_metadata()) else None


def _staged_values(staged: StagedImage) -> pa.Table:
    return pa.ipc.open_stream(staged.data).read_all()
