"""The commit protocol: how a shard becomes done, and the proof that it is.

An attempt at a shard writes in this order. Each object exists whole or not at all (Store):

    0. staging    _run/staging/NNNNN/ID.parquet, the finished images of a batch
    1. data       train/NNNNN.tar, or train/NNNNN.parquet, or the images one by one
    2. metadata   metadata/NNNNN.parquet
    3. copies     train/NNNNN/metadata.parquet, the list of images from 2, if they are stored one by one;
                  _run/failed/NNNNN.parquet, the failed rows, if there are any
    4. commit     _run/commits/NNNNN.json, which names the files in train/ and metadata/ with size and sha256
    5. clean-up   the objects of 0 are removed

Killed in 0   A batch is staged while the next one is made, and a third one starts only after that. So the kill loses
              the batch being made, and at most the batch being staged. The next attempt at the shard, on any node,
              adopts the staged images whose digest is right and which the current plan asks for. Batches are formed
              from all rows, staged or not, so that an image has the same neighbours, and the same bytes, as in an
              undisturbed run. Steps 1 to 5 run while the next shard is in step 0, so a kill then loses that, too.
Killed in 1   The next attempt adopts all images, and keeps the files that exist already.
Killed in 2-3 The same. Before 4 no reader follows the files: the shard is not done, even if all its files exist.
Killed in 4   The commit exists or not. If only the answer is lost, the next attempt reads the commit and makes nothing.
Killed in 5   The shard is done. The remaining staged objects are removed when the run is complete, or by `gc`.

Only the commit makes a shard done, and it is written after everything it names: a reader that follows the commits never
sees half a shard. Staging only saves time: losing staged images costs the time to make them again.

Data, metadata and commit are put-if-absent: for each file the first writer wins. A worker that finds a file already
written reads it. If its bytes differ (a device rounds differently, or a row failed for only one of two workers), the
worker adopts them, and everything that it writes later describes them. From 2 on the metadata decides: a worker that
finds the metadata of another takes the files that it names, and removes its own image of a row that failed there. So
two workers on one shard, in any interleaving, end with one consistent set of files and one commit. The second one
removes its staged images, reports the existing commit, and overwrites nothing. In 0 each writer has names of its own; 3
is always derived from the stored metadata.

Lost workers leave a trace. After the first loss on a shard, each batch waits until the one before it is staged. It is
marked as started (_run/staging/NNNNN/try-*.json) before anything of it is read or made, and the mark is removed after
it. A batch whose mark was left behind is made last in the next attempt, one image at a time; an image whose mark was
left behind twice is recorded as failed (WorkerLost). Everything else of the shard is made and committed.

Put-if-absent is one conditional request for an object of up to 5 GiB, never a multipart upload: some stores honour the
condition of a single request but ignore it at the end of a multipart upload. On a store that ignores both,
put-if-absent is a look-up followed by one request. There an object of 5 MiB or more is first uploaded in parts; then
its writers take turns (storage/turns.py) to look it up and to complete their uploads. So a writer that is delayed
during its upload, for however long, changes nothing, and only one of several concurrent writers is the first.

The remaining risk on such a store: two workers that publish one shard can overwrite each other's objects below 5 MiB if
both have looked before the request of either arrives, and larger ones if one is delayed for 10 s between the two steps.
The latter also holds for objects above 5 GiB on stores that honour only single conditional requests. It is harmless if
both make the same bytes, as devices of one kind do; metadata and commit are small and describe the stored data.
Otherwise the later files stay, the commit may be the earlier one, and `verify` finds the difference by the sha256. It
takes two workers that finish the same shard within one request: a partitioned worker, or the duplicate of a slow shard
at the end of a run. Nothing else depends on conditional writes.

A revert (revert.py) removes files, which put-if-absent cannot prevent. It needs the lease, so only a worker whose
driver has lost the run can be in steps 1 to 4 then. A worker that was delayed there for long, for example because its
machine slept, checks before 4 that its files still exist.

A kill during a multipart upload leaves its parts in the store, where no listing of objects shows them. They are aborted
at the end of the run and by `gc`, and `verify` counts them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from flux_batch.config.schema import SOURCE_COLUMNS
from flux_batch.errors import AlreadyExists, DamagedObject, FluxBatchError, NotFound
from flux_batch.output.formats import OutputFormat, Sample, StoredSample, iter_samples
from flux_batch.output.lease import uptime_s
from flux_batch.output.metadata import pack_failures, pack_metadata, source_fields, unpack_metadata
from flux_batch.output.paths import (
    ANNOTATIONS,
    COMMITS,
    METADATA,
    TRAIN,
    RunFolder,
    ShardFiles,
    failed_file,
    is_within,
    metadata_file,
    number_in,
)
from flux_batch.records import Commit, ImageRecord, ShardWork, StoredFile
from flux_batch.storage.entries import Entry
from flux_batch.storage.store import Store

_VERSION = 1
_READERS = 16
# The number of commits in memory at once: one that names single images takes about 50 kB.
_READ_AHEAD = 256
# The number of concurrent uploads: single images are small, so their speed depends on the requests in flight.
_WRITERS = 16
# After this time a publishing worker may have slept while another driver had the run and reverted the shard.
_HELD_UP_S = 10.0
_NO_WORK = ShardWork()


@dataclass(frozen=True)
class Commits:
    """The commits of a run; those of annotations have a `folder` of their own."""

    run: RunFolder
    folder: str = COMMITS

    def done(self) -> set[int]:
        """Return the shards that are committed."""
        return self.run.store.scan(self.folder, _numbers_in, with_sizes=False)

    def listed(self, first: int = 0) -> ShardFiles:
        """List the commits of the plan's shards from `first` on, and other objects beside them.

        Raises: StoreError.
        """
        return ShardFiles.list(self.run, self.folder, ".json", with_sizes=False, first=first)

    def read(self, shard: int) -> Commit:
        """Read the commit of a shard. Raises: NotFound if it is not done, DamagedObject if it is damaged."""
        key = self.key(shard)
        try:
            return parse_commit(self.run.store.read(key))
        except ValueError as error:
            raise DamagedObject(
                f"{self.run.store.url(key)}: {error}; `flux-batch verify --repair` reverts it"
            ) from error

    def find(self, shard: int) -> Commit | None:
        """Return the commit of a shard, None if it is not done. Raises: DamagedObject."""
        with suppress(NotFound):
            return self.read(shard)
        return None

    def read_all(self, shards: Sequence[int]) -> Iterator[Commit]:
        """Yield commits in the given order, with only a few in memory. Raises: the errors of `read`."""
        with ThreadPoolExecutor(_READERS) as pool:
            for first in range(0, len(shards), _READ_AHEAD):
                yield from pool.map(self.read, shards[first : first + _READ_AHEAD])

    def find_all(self, shards: Iterable[int]) -> list[Commit]:
        """Read the commits of those shards that are done, several at a time. Raises: the errors of `find`."""
        with ThreadPoolExecutor(_READERS) as pool:
            return [commit for commit in pool.map(self.find, shards) if commit]

    def put(self, commit: Commit) -> Commit:
        """Write a commit, which makes its shard done. Returns: the stored commit, which may be another worker's."""
        body = json.dumps({"version": _VERSION, **asdict(commit)}, indent=1).encode()
        try:
            self.run.store.put_if_absent(self.key(commit.shard), body)
        except AlreadyExists:
            return self.read(commit.shard)
        return commit

    def key(self, shard: int) -> str:
        """Return the name of a shard's commit."""
        return f"{self.folder}/{self.run.shard_name(shard)}.json"


def _numbers_in(entries: Iterable[Entry]) -> set[int]:
    """Return the numbers of the commits in a folder."""
    names = (name for name, size in entries if size is not None)
    return {number for name in names if (number := number_in(name, ".json")) is not None}


def parse_commit(data: bytes) -> Commit:
    """Parse a commit from the bytes of its object. Raises: ValueError if they are not a commit."""
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
            started_unix_time=float(fields.get("started_unix_time", 0)),
            finished_unix_time=float(fields.get("finished_unix_time", 0)),
            stage_s={str(name): float(seconds) for name, seconds in fields.get("stage_s", {}).items()},
            attempt=int(fields.get("attempt", 1)),
            num_lost=int(fields.get("num_lost", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a commit of this program ({error!r})") from error


def _file_of_run(*, path: str, bytes: int, sha256: str) -> StoredFile:
    """Return the record of a file. Raises: ValueError for a path outside the data set: the commit is not trusted."""
    if not is_within(path, TRAIN, METADATA, ANNOTATIONS):
        raise ValueError(f"{path!r} is not a file of a run")
    return StoredFile(path=path, bytes=bytes, sha256=sha256)


@dataclass(frozen=True)
class Publisher:
    """The writer of finished shards, by the protocol above."""

    commits: Commits
    output_format: OutputFormat
    passthrough: pa.Schema
    worker: str
    clock: Callable[[], float] = uptime_s

    def publish(
        self,
        shard: int,
        records: Sequence[ImageRecord],
        images: dict[str, Path],
        scratch: Path,
        work: ShardWork = _NO_WORK,
    ) -> Commit:
        """Write data, failures, metadata and commit of a shard.

        `records`: all records of the shard in input order, failed ones included; `images`: the encoded file of each
        successful image, by key; `scratch`: an empty local folder; `work`: written into the commit. Returns: the stored
        commit. Raises: FluxBatchError if files of the shard were removed meanwhile.
        """
        started, began = time.monotonic(), self.clock()
        name = self.commits.run.shard_name(shard)
        stored = _StoredData(self.commits.run.store, scratch)
        records = self._put_images(name, records, images, stored)
        metadata, data = self._put_metadata(name, records)
        rows = unpack_metadata(data)
        self._put_list(name, records, rows, stored)
        if failed := pack_failures(data):
            self.commits.run.store.write(failed_file(name), failed)
        failures = Counter(row["error_type"] for row in rows if row["status"] == "failed")
        files = (*stored.files.values(), metadata)
        if self.clock() - began >= _HELD_UP_S:
            self._check_there(files)
        return self.commits.put(
            Commit(
                shard=shard,
                worker=self.worker,
                num_images=len(rows),
                num_failed=failures.total(),
                files=files,
                failures=dict(sorted(failures.items())),
                device_s=round(work.device_s, 3),
                started_unix_time=round(work.started_unix_time, 3),
                finished_unix_time=round(time.time(), 3),
                stage_s=_rounded({**work.stage_s, "publish": time.monotonic() - started}),
                attempt=work.attempt,
                num_lost=work.num_lost,
            )
        )

    def _put_images(
        self, name: str, records: Sequence[ImageRecord], images: dict[str, Path], stored: _StoredData
    ) -> Sequence[ImageRecord]:
        """Write the images. Returns: the records, with the facts of the stored images, whoever made them."""
        if samples := [Sample(record, images[record.key]) for record in records if record.status == "success"]:
            stored.create(self.output_format.pack(name, samples, stored.scratch))
        # Another attempt may have made the images that failed here.
        failed = [record.key for record in records if record.status == "failed"]
        for files in sorted({self.output_format.image_files(name, key) for key in failed}):
            stored.adopt(files)
        if not stored.is_adopted:
            return records
        samples_there = iter_samples(self.output_format, name, stored.paths)
        return self._adopted(name, records, {sample.key: _StoredImage.of_sample(sample) for sample in samples_there})

    def _put_list(
        self, name: str, records: Sequence[ImageRecord], rows: Sequence[Mapping[str, Any]], stored: _StoredData
    ) -> None:
        """Write the list of the images in `rows`, the metadata; keep the files of these, and remove others."""
        images = {row["key"]: _StoredImage.of_row(row) for row in rows if row["status"] == "success"}
        files = [self.output_format.image_files(name, key) for key in images]
        stored.remove(stored.files.keys() - {file for some in files for file in some})
        for some in files:
            stored.adopt(some)
        stored.create(self.output_format.list_images(name, self._adopted(name, records, images), stored.scratch))

    def _adopted(
        self, name: str, records: Sequence[ImageRecord], images: Mapping[str, _StoredImage]
    ) -> Sequence[ImageRecord]:
        """Return the records, with the facts of the stored images, whoever made them."""
        return [_adopt(record, images, self.output_format.file_name(name, record.key)) for record in records]

    def _check_there(self, files: Sequence[StoredFile]) -> None:
        """Raise FluxBatchError unless all files exist with their recorded sizes."""

        def is_there(file: StoredFile) -> bool:
            try:
                return self.commits.run.store.size(file.path) == file.bytes
            except NotFound:
                return False

        with ThreadPoolExecutor(_READERS) as pool:
            are_there = [*pool.map(is_there, files)]
        for file, here in zip(files, are_there, strict=True):
            if not here:
                raise FluxBatchError(
                    f"{self.commits.run.store.url(file.path)}: was removed or replaced while this worker was delayed; "
                    "its shard is not committed"
                )

    def _put_metadata(self, name: str, records: Sequence[ImageRecord]) -> tuple[StoredFile, bytes]:
        key = metadata_file(name)
        data = pack_metadata(records, self.passthrough)
        try:
            self.commits.run.store.put_if_absent(key, data)
        except AlreadyExists:
            data = self.commits.run.store.read(key)
        return StoredFile(path=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()), data


@dataclass(frozen=True, slots=True)
class _StoredImage:
    """The facts of a stored image; `sources`: the columns of its source images."""

    sha256: str
    bytes: int
    sources: Mapping[str, str]

    @classmethod
    def of_sample(cls, sample: StoredSample) -> _StoredImage:
        """Return the facts of an image from its bytes."""
        sources = source_fields(sample.sources.values())
        return cls(hashlib.sha256(sample.image).hexdigest(), len(sample.image), sources)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> _StoredImage:
        """Return the facts of an image from its row of the metadata."""
        sources = {name: row[name] for name in SOURCE_COLUMNS if row.get(name) is not None}
        return cls(row["sha256"], row["bytes"], sources)


class _StoredData:
    """The stored data files of a shard: our own, or those of a worker that came first."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self.scratch = scratch
        self.files: dict[str, StoredFile] = {}  # by key, like `paths`
        self.paths: dict[str, Path] = {}  # local copies
        self.is_adopted = False

    def create(self, files: Iterable[tuple[str, Path]]) -> None:
        """Store our files, several at a time; keep files that exist already."""
        with ThreadPoolExecutor(_WRITERS) as pool:
            for file, path, is_adopted in pool.map(self._create, files):
                self._add(file, path, is_adopted)

    def adopt(self, keys: Sequence[str]) -> None:
        """Add files that another worker stored, if all of them exist."""
        missing = [key for key in keys if key not in self.paths]
        if all(self._store.exists(key) for key in missing):
            for key in missing:
                self._add(*self._fetch(key), True)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files of images that another worker has recorded as failed."""
        for key in sorted(keys):
            self._store.delete(key)
            del self.files[key], self.paths[key]

    def _create(self, file: tuple[str, Path]) -> tuple[StoredFile, Path, bool]:
        """Write a file unless it exists. Returns: the file, a local copy, and whether another worker wrote it."""
        key, path = file
        ours = _stored_file(key, path)
        try:
            self._store.put_if_absent(key, path)
        except AlreadyExists:
            theirs, copy = self._fetch(key)
            return theirs, copy, theirs != ours
        return ours, path, False

    def _fetch(self, key: str) -> tuple[StoredFile, Path]:
        path = self.scratch / f"adopted-{key.replace('/', '-')}"
        self._store.download(key, path)
        return _stored_file(key, path), path

    def _add(self, file: StoredFile, path: Path, is_adopted: bool) -> None:
        self.files[file.path] = file
        self.paths[file.path] = path
        self.is_adopted |= is_adopted


def _adopt(record: ImageRecord, images: Mapping[str, _StoredImage], file_name: str) -> ImageRecord:
    """Return a record with the facts of the stored image, whoever made it."""
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
    image = images[record.key]
    return replace(
        record,
        status="success",
        error_type=None,
        error_message=None,
        file_name=file_name,
        sha256=image.sha256,
        bytes=image.bytes,
        passthrough={**record.passthrough, **image.sources},
    )


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in sorted(seconds.items())}


def _stored_file(key: str, path: Path) -> StoredFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return StoredFile(path=key, bytes=path.stat().st_size, sha256=digest.hexdigest())
