"""How a shard becomes done, and the proof that it is: the commit protocol.

The order of writes of one attempt at a shard. Each object is there whole or not at all (Store):

    0. staging    _run/staging/NNNNN/ID.parquet, the finished images of a batch
    1. data       train/NNNNN.tar, or train/NNNNN.parquet, or the images one by one and then the list of them
    2. metadata   metadata/NNNNN.parquet
    3. failures   _run/failed/NNNNN.parquet, the failed rows of 2 once more, when there are any
    4. commit     _run/commits/NNNNN.json, which names the files of 1 and 2 with size and sha256
    5. clean-up   the objects of 0 are removed

Killed in 0   A batch is staged while the next is made, and no third is begun before it is: lost are the batch in the
              making and at most the one on its way. Whoever takes the shard next, on any node, adopts what is staged.
              A staged image counts if its digest is right and it is what the plan asks for now; batches are formed
              of all rows, whatever is there, so that the rest has the neighbours, and the bytes, of an undisturbed run.
              1 to 5 run while the next shard is at 0: a kill then loses what it loses in 0.
Killed in 1   The next attempt adopts all images, and meets the files that are there, which it keeps.
Killed in 2-3 The same. Before 4 nobody follows the files: nothing is done, however much is there.
Killed in 4   The commit is there or not. If its answer is lost, the next attempt reads it and makes nothing.
Killed in 5   The shard is done. What is left is removed when the run is complete, or by `gc`.

The commit alone makes a shard done, and it comes after everything it names: a reader that follows the commits never
sees half a shard. What lies in staging is a saving and never a fact; to lose it costs time and no image.

1, 2 and 4 are put-if-absent: the first writer wins, file by file. Whoever finds a file taken reads what is there: the
same bytes are as good as its own; other bytes (a device that rounds differently, a row that failed for one and not for
the other) are adopted, and what is written after them describes them and not the writer's own. So two workers on one
shard, in any interleaving, end in one set of files that fit together, and in one commit; the one that comes second
removes what it staged, reports the commit that stands, and overwrites nothing. 0 has names of its own for each writer;
3 is a copy of what 2 says, whoever wrote that.

A worker that is lost tells by what it leaves. After the first loss on a shard, each batch waits until the last one is
staged, is announced (_run/staging/NNNNN/try-*.json) before anything of it is read or made, and the announcement is
withdrawn after it. A batch that was announced and not withdrawn is next made last, one image at a time; an image
left behind twice is recorded as failed (WorkerLost). Everything else of the shard is made and committed.

On a store without conditional writes, put-if-absent is a look-up and a write. Two workers that render one shard within
the same moment can then overwrite each other: harmless while they make the same bytes, which the same kind of device
does. If they do not, the files of the later one stand, the commit may be of the earlier, and `verify` tells by the
sha256. It takes two workers that publish the same shard within one request: a partitioned worker, or the duplicate of
a slow shard at the end of a run. Nothing else rests on conditional writes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa

from flux_batch.errors import AlreadyExists, NotFound, StoreError
from flux_batch.output.formats import OutputFormat, Sample, iter_images
from flux_batch.output.metadata import pack_failures, pack_metadata, unpack_metadata
from flux_batch.output.paths import (
    COMMITS,
    METADATA,
    TRAIN,
    RunFolder,
    commit_file,
    failed_file,
    is_within,
    metadata_file,
    number_in,
)
from flux_batch.records import Commit, ImageRecord, StoredFile
from flux_batch.storage.store import Store

VERSION = 1
READERS = 16
# Single images are small: what counts is how many are on their way to a bucket at once.
WRITERS = 16


@dataclass(frozen=True)
class Commits:
    """The commits of a run."""

    run: RunFolder

    def done(self) -> set[int]:
        """List the shards that are committed."""
        numbers = (number_in(key.rpartition("/")[2], ".json") for key in self.run.store.list(COMMITS))
        return {number for number in numbers if number is not None}

    def read(self, shard: int) -> Commit:
        """Read the commit of a shard. Raises: NotFound if it is not done, StoreError if it is damaged."""
        key = self.key(shard)
        try:
            return parse_commit(self.run.store.read(key))
        except ValueError as error:
            raise StoreError(f"{self.run.store.url(key)}: {error}; `flux-batch verify --repair` reverts it") from error

    def find(self, shard: int) -> Commit | None:
        """Return the commit of a shard, None if it is not done. Raises: StoreError if it is damaged."""
        with suppress(NotFound):
            return self.read(shard)
        return None

    def read_all(self, shards: Iterable[int]) -> list[Commit]:
        """Read many commits at once."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.read, shards))

    def put(self, commit: Commit) -> Commit:
        """Make a shard done. Returns: the commit that stands, which is another worker's if that came first."""
        body = json.dumps({"version": VERSION, **asdict(commit)}, indent=1).encode()
        try:
            self.run.store.put_if_absent(self.key(commit.shard), body)
        except AlreadyExists:
            return self.read(commit.shard)
        return commit

    def key(self, shard: int) -> str:
        """Name the commit of a shard."""
        return commit_file(self.run.shard_name(shard))


def parse_commit(data: bytes) -> Commit:
    """Read a commit from the bytes of its object. Raises: ValueError if they are none."""
    try:
        fields = json.loads(data)
        return Commit(
            shard=int(fields["shard"]),
            worker=str(fields["worker"]),
            num_images=int(fields["num_images"]),
            num_failed=int(fields["num_failed"]),
            files=tuple(_file_of_run(**file) for file in fields["files"]),
            failures={str(name): int(count) for name, count in fields.get("failures", {}).items()},
            device_s=float(fields.get("device_s", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a commit of this program ({error!r})") from error


def _file_of_run(*, path: str, bytes: int, sha256: str) -> StoredFile:
    """Make the record of a file. Raises: ValueError for a path that leads elsewhere: an output may be a stranger's."""
    if not is_within(path, TRAIN, METADATA):
        raise ValueError(f"{path!r} is no file of a run")
    return StoredFile(path=path, bytes=bytes, sha256=sha256)


@dataclass(frozen=True)
class Publisher:
    """Takes the finished images of a shard through the protocol above."""

    commits: Commits
    output_format: OutputFormat
    passthrough: pa.Schema
    worker: str

    def publish(
        self,
        shard: int,
        records: Sequence[ImageRecord],
        images: dict[str, Path],
        scratch: Path,
        device_s: float = 0.0,
    ) -> Commit:
        """Write data, failures, metadata and commit of a shard.

        `records` are all of the shard in input order, failed ones included; `images` has the encoded file of each
        made one by key; `scratch` is an empty local folder; `device_s` is noted in the commit. Returns: the commit that
        stands.
        """
        name = self.commits.run.shard_name(shard)
        files, records = self._put_data(name, records, images, scratch)
        metadata, data = self._put_metadata(name, records)
        if failed := pack_failures(data):
            self.commits.run.store.write(failed_file(name), failed)
        rows = unpack_metadata(data)
        failures = Counter(row["error_type"] for row in rows if row["status"] == "failed")
        return self.commits.put(
            Commit(
                shard=shard,
                worker=self.worker,
                num_images=len(rows),
                num_failed=failures.total(),
                files=(*files, metadata),
                failures=dict(sorted(failures.items())),
                device_s=round(device_s, 3),
            )
        )

    def _put_data(
        self, name: str, records: Sequence[ImageRecord], images: dict[str, Path], scratch: Path
    ) -> tuple[list[StoredFile], Sequence[ImageRecord]]:
        """Write the data files. Returns: them, and the records, which now describe what is stored, whoever made it."""
        put = _Files(self.commits.run.store, scratch)
        if samples := [Sample(record, images[record.key]) for record in records if record.status == "success"]:
            put.create(self.output_format.pack(name, samples, scratch))
        # What failed for us, another attempt may have made.
        failed = [record.key for record in records if record.status == "failed"]
        for file in sorted({self.output_format.file_name(name, key) for key in failed}):
            put.adopt(file)
        if put.is_adopted:
            adopted = dict(iter_images(self.output_format, name, put.paths))
            records = [_adopt(record, adopted, self.output_format.file_name(name, record.key)) for record in records]
        put.create(self.output_format.list_images(name, records, scratch))
        return put.stored, records

    def _put_metadata(self, name: str, records: Sequence[ImageRecord]) -> tuple[StoredFile, bytes]:
        key = metadata_file(name)
        data = pack_metadata(records, self.passthrough)
        try:
            self.commits.run.store.put_if_absent(key, data)
        except AlreadyExists:
            data = self.commits.run.store.read(key)
        return StoredFile(path=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()), data


class _Files:
    """The data files of a shard as they are stored, ours or those of whoever came first."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch
        self.stored: list[StoredFile] = []
        self.paths: dict[str, Path] = {}  # a local copy of each, by key
        self.is_adopted = False

    def create(self, files: Iterable[tuple[str, Path]]) -> None:
        """Store files of ours, several at a time, each unless there is one."""
        with ThreadPoolExecutor(WRITERS) as pool:
            for file, path, is_adopted in pool.map(self._create, files):
                self._add(file, path, is_adopted)

    def adopt(self, key: str) -> None:
        """Take in a file that we did not make, if there is one."""
        if key not in self.paths and self._store.exists(key):
            self._add(*self._fetch(key), True)

    def _create(self, file: tuple[str, Path]) -> tuple[StoredFile, Path, bool]:
        """Store one file. Returns: what is stored, a local copy of it, and whether it is another's."""
        key, path = file
        ours = _stored_file(key, path)
        try:
            self._store.put_if_absent(key, path)
        except AlreadyExists:
            theirs, copy = self._fetch(key)
            return theirs, copy, theirs != ours
        return ours, path, False

    def _fetch(self, key: str) -> tuple[StoredFile, Path]:
        path = self._scratch / f"adopted-{key.replace('/', '-')}"
        self._store.download(key, path)
        return _stored_file(key, path), path

    def _add(self, file: StoredFile, path: Path, is_adopted: bool) -> None:
        self.stored.append(file)
        self.paths[file.path] = path
        self.is_adopted |= is_adopted


def _adopt(record: ImageRecord, images: dict[str, bytes], file_name: str) -> ImageRecord:
    """Let a record describe the image that is stored, whoever made it."""
    if record.key not in images:
        if record.status == "failed":
            return record
        return replace(
            record,
            status="failed",
            error_type="Superseded",
            error_message=f"{record.key}: made, but another worker had already stored its shard without it",
            file_name=None,
            sha256=None,
            bytes=None,
        )
    data = images[record.key]
    return replace(
        record,
        status="success",
        error_type=None,
        error_message=None,
        file_name=file_name,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
    )


def _stored_file(key: str, path: Path) -> StoredFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return StoredFile(path=key, bytes=path.stat().st_size, sha256=digest.hexdigest())
