"""The commit protocol: how a shard becomes done, and the proof that it is.

The order of writes of one attempt at a shard. Each object is there whole or not at all (Store):

    0. staging    _run/staging/NNNNN/ID.parquet, the finished images of a batch
    1. data       train/NNNNN.tar, or train/NNNNN.parquet, or the images one by one
    2. metadata   metadata/NNNNN.parquet
    3. copies     train/NNNNN/metadata.parquet, the images of 2 once more, where they are stored one by one;
                  _run/failed/NNNNN.parquet, its failed rows, when there are any
    4. commit     _run/commits/NNNNN.json, which names the files in train/ and metadata/ with size and sha256
    5. clean-up   the objects of 0 are removed

Killed in 0   A batch is staged while the next is made, and no third begins before that: the batch in the making is
              lost, and at most the one on its way. The next attempt at the shard, on any node, adopts what is staged.
              A staged image counts if its digest is right and it is what the plan asks for now. Batches are formed of
              all rows, staged or not, so that an image has the neighbours, and the bytes, of an undisturbed run.
              1 to 5 run while the next shard is at 0: a kill then loses what it loses in 0.
Killed in 1   The next attempt adopts all images. It keeps the files that are there already.
Killed in 2-3 The same. Before 4 no reader follows the files: the shard is not done, however much of it is there.
Killed in 4   The commit is there or not. If its answer is lost, the next attempt reads it and makes nothing.
Killed in 5   The shard is done. The rest of 0 is removed when the run is complete, or by `gc`.

The commit alone makes a shard done, and it comes after everything it names: a reader that follows the commits never
sees half a shard. Staging saves time and proves nothing: losing it costs no image.

Data, metadata and commit are put-if-absent: the first writer wins, file by file. A worker that finds a file taken reads
it. The same bytes are as good as its own; other bytes (a device that rounds differently, a row that failed for one
worker and not for the other) are adopted, and everything written after them describes them. From 2 on the metadata
decides: a worker that finds another's takes the files that it names, and removes an image of its own whose row failed
there. So two workers on one shard, in any interleaving, end in one set of files that fit together, and in one commit;
the second one removes what it staged, reports the commit that stands, and overwrites nothing. Each writer has its own
names in 0; 3 is made of 2, whoever wrote that.

A lost worker leaves a trace. After the first loss on a shard, each batch waits until the last one is staged. It is
marked as started (_run/staging/NNNNN/try-*.json) before anything of it is read or made, and the mark is removed after
it. A batch whose mark was left behind is made last in the next attempt, one image at a time; an image whose mark was
left behind twice is recorded as failed (WorkerLost). Everything else of the shard is made and committed.

Put-if-absent is one conditional request for an object of up to 5 GiB, whatever parts a client might send it in: some
stores honour the condition there, and ignore it at the end of an upload in parts. On a store that ignores it there too,
put-if-absent is a look-up and then one request. An object of 5 MiB or more is sent in parts first; when they are all
there, its writers take turns (storage/turns.py) to look it up and to end their upload. So a writer that was held up in
the middle of an upload, for however long, changes nothing, and of several at once one is the first.

What is left on such a store: two workers that publish one shard can overwrite each other's objects below 5 MiB if both
have looked before the request of either has arrived, and larger ones if one is held up for 10 s between the two; that
goes for objects above 5 GiB on stores that honour single conditional requests alone. It is harmless while they make the
same bytes, as devices of one kind do; metadata and commit, which are small, describe the data that stands. Otherwise
the files of the later one stand, the commit may be of the earlier one, and `verify` finds it by the sha256. It takes
two workers that finish the same shard within one request: a partitioned worker, or the duplicate of a slow shard at the
end of a run. Nothing else depends on conditional writes.

A revert (revert.py) removes files, and put-if-absent is no guard against that. It needs the lease, so only a worker
whose driver has lost the run can be in the middle of 1 to 4 then. One that was held up there for long, as by a machine
that slept, looks whether its files are still there before 4.

A kill in the middle of an upload in parts leaves these in the store, where no listing of objects shows them. They are
aborted at the end of the run and by `gc`, and `verify` counts them.
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
# Commits that are in memory at once: one that names single images takes some 50 kB.
_READ_AHEAD = 256
# Uploads at once: single images are small, so their speed depends on the number of requests in flight.
_WRITERS = 16
# A worker that took so long to publish may have slept while another driver had the run, and reverted the shard.
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
        """List the commits of the plan's shards in columns, and what else lies beside them.

        Those before `first` are left out. Raises: StoreError.
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
        """Yield commits in the order given; only a few are in memory. Raises: the errors of `read`."""
        with ThreadPoolExecutor(_READERS) as pool:
            for first in range(0, len(shards), _READ_AHEAD):
                yield from pool.map(self.read, shards[first : first + _READ_AHEAD])

    def find_all(self, shards: Iterable[int]) -> list[Commit]:
        """Read the commits of those shards that are done, several at a time. Raises: as `find`."""
        with ThreadPoolExecutor(_READERS) as pool:
            return [commit for commit in pool.map(self.find, shards) if commit]

    def put(self, commit: Commit) -> Commit:
        """Write a commit, which makes its shard done. Returns: the commit that stands, perhaps another worker's."""
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
    """Read a commit from the bytes of its object. Raises: ValueError if they are not a commit."""
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
    """Return the record of a file. Raises: ValueError for a path outside the data set, as a stranger may write it."""
    if not is_within(path, TRAIN, METADATA, ANNOTATIONS):
        raise ValueError(f"{path!r} is not a file of a run")
    return StoredFile(path=path, bytes=bytes, sha256=sha256)


@dataclass(frozen=True)
class Publisher:
    """The writer of finished shards: takes their images through the protocol above."""

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

        `records` are all of the shard in input order, failed ones included; `images` has the encoded file of each made
        image by key; `scratch` is an empty local folder; `work` is written into the commit. Returns: the commit that
        stands. Raises: FluxBatchError if files of it were removed meanwhile.
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
        """Write the images. Returns: the records of those that are stored, whoever made them."""
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
        """Write the list of the images in the metadata, `rows`; keep the files of these, and remove others."""
        images = {row["key"]: _StoredImage.of_row(row) for row in rows if row["status"] == "success"}
        files = [self.output_format.image_files(name, key) for key in images]
        stored.remove(stored.files.keys() - {file for some in files for file in some})
        for some in files:
            stored.adopt(some)
        stored.create(self.output_format.list_images(name, self._adopted(name, records, images), stored.scratch))

    def _adopted(
        self, name: str, records: Sequence[ImageRecord], images: Mapping[str, _StoredImage]
    ) -> Sequence[ImageRecord]:
        """Return the records of images that are stored, whoever made them."""
        return [_adopt(record, images, self.output_format.file_name(name, record.key)) for record in records]

    def _check_there(self, files: Sequence[StoredFile]) -> None:
        """Raise FluxBatchError unless all files are there, with their sizes."""

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
                    f"{self.commits.run.store.url(file.path)}: was removed or replaced while this worker was held up; "
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
    """The facts of an image that is stored; `sources` are the columns of its source images."""

    sha256: str
    bytes: int
    sources: Mapping[str, str]

    @classmethod
    def of_sample(cls, sample: StoredSample) -> _StoredImage:
        """Return those of an image whose bytes are here."""
        sources = source_fields(sample.sources.values())
        return cls(hashlib.sha256(sample.image).hexdigest(), len(sample.image), sources)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> _StoredImage:
        """Return those of an image that the metadata has."""
        sources = {name: row[name] for name in SOURCE_COLUMNS if row.get(name) is not None}
        return cls(row["sha256"], row["bytes"], sources)


class _StoredData:
    """The stored data files of a shard: ours, or those of a worker that came first."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self.scratch = scratch
        self.files: dict[str, StoredFile] = {}  # by key, as the next
        self.paths: dict[str, Path] = {}  # local copies
        self.is_adopted = False

    def create(self, files: Iterable[tuple[str, Path]]) -> None:
        """Store files of ours, several at a time, each unless it is there already."""
        with ThreadPoolExecutor(_WRITERS) as pool:
            for file, path, is_adopted in pool.map(self._create, files):
                self._add(file, path, is_adopted)

    def adopt(self, keys: Sequence[str]) -> None:
        """Add files that another worker stored, if all are there."""
        missing = [key for key in keys if key not in self.paths]
        if all(self._store.exists(key) for key in missing):
            for key in missing:
                self._add(*self._fetch(key), True)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files that belong to no image: another worker has settled that these failed."""
        for key in sorted(keys):
            self._store.delete(key)
            del self.files[key], self.paths[key]

    def _create(self, file: tuple[str, Path]) -> tuple[StoredFile, Path, bool]:
        """Write one file unless another worker has. Returns: the file, a local copy, whether another wrote it."""
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
    """Return a record of the image that is stored, whoever made it."""
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
