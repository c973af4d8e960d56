"""The log of commits: the counts of a run's commits in one file, so that thousands need not be read one by one.

`_run/commit_log.parquet` has a row for each commit, and the `end` below which it lacks only a few shards. The driver
writes it after every thousand commits and at the end.

The log proves nothing: only its commit makes a shard done. If one request lists all commits, they are listed and the
log adds their counts. In a bucket with more commits, only those from the log's end on are listed, and those that the
log lacks below are looked up: a few requests, however long the run is. In that case stale logs are excluded as follows:
a log whose first or last commit is gone is not used; the log is removed before any commit is, and may be written again
afterwards; and _SUCCESS is written only after a listing of all commits. A log that is missing, damaged or of another
version only costs time, since the commits are read instead.
"""

from __future__ import annotations

import io
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.errors import Interrupted, NotFound
from flux_batch.output.commits import Commits
from flux_batch.output.paths import COMMIT_LOG
from flux_batch.records import Commit, ShardResult

log = logging.getLogger(__name__)

VERSION = 2
_COMMITS_A_WRITE = 1000
# The number of names that S3 lists by one request.
NAMES_A_PAGE = 1000
# The number of shards that the log may lack below its end: each costs a request when the log is read.
_MAX_LACKING = 64
_ROWS_AT_ONCE = 65_536
_COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        ("num_images", pa.int32()),
        ("num_failed", pa.int32()),
        ("num_bytes", pa.int64()),  # of all files that the commit names
        ("device_s", pa.float64()),
        ("failures", pa.string()),  # a JSON object: error type -> number of images
    ]
)


@dataclass
class CommitLog:
    """The counts of the committed shards of a run, in columns."""

    commits: Commits
    shards: array[int] = field(default_factory=lambda: array("i"))
    num_images: array[int] = field(default_factory=lambda: array("i"))
    num_failed: array[int] = field(default_factory=lambda: array("i"))
    num_bytes: array[int] = field(default_factory=lambda: array("q"))
    device_s: array[float] = field(default_factory=lambda: array("d"))
    failures: dict[int, dict[str, int]] = field(default_factory=dict)  # only of shards with failures
    num_written: int = 0

    @classmethod
    def read(cls, commits: Commits) -> CommitLog:
        """Return the counts of every commit. Raises: StoreError if one that is not in the log is damaged."""
        found, end = cls.saved(commits)
        found._read_new(end)
        return found

    def update(self) -> None:
        """Read the commits that are new since the last reading. Raises: StoreError if one is damaged."""
        self._read_new(self._end)

    def _read_new(self, end: int) -> None:
        """Read the commits that are not in the log yet; below `end` it lacks only a few."""
        commits = self.commits
        if end <= NAMES_A_PAGE or commits.run.store.is_local:
            end, listed = 0, commits.listed()
            self._keep(listed.__contains__)
        else:
            listed = commits.listed(first=end)
        is_known = self.is_done
        new = array("i", (shard for shard in listed if not is_known[shard]))
        for commit in commits.read_all(new):
            self.add(commit)
        for commit in commits.find_all(shard for shard in range(end) if not is_known[shard]):
            self.add(commit)

    @property
    def is_done(self) -> bytearray:
        """1 for each committed shard of the plan: one byte each, where a set takes a hundred."""
        is_done = bytearray(self.commits.run.num_shards)
        for shard in self.shards:
            is_done[shard] = 1
        return is_done

    @property
    def _columns(self) -> Sequence[array[Any]]:
        """The counts, as the first columns of the file."""
        return self.shards, self.num_images, self.num_failed, self.num_bytes, self.device_s

    @property
    def _end(self) -> int:
        """The shard below which the log lacks only a few."""
        end = num_lacking = 0
        for shard, is_there in enumerate(self.is_done):
            num_lacking += not is_there
            if num_lacking > _MAX_LACKING:
                break
            if is_there:
                end = shard + 1
        return end

    @property
    def all_failures(self) -> Counter[str]:
        """The number of failed images by error type."""
        total: Counter[str] = Counter()
        for counts in self.failures.values():
            total.update(counts)
        return total

    def add(self, commit: Commit | ShardResult) -> None:
        """Add the counts of a commit."""
        self.shards.append(commit.shard)
        self.num_images.append(commit.num_images)
        self.num_failed.append(commit.num_failed)
        self.num_bytes.append(commit.num_bytes)
        self.device_s.append(round(commit.device_s, 3))
        if commit.failures:
            self.failures[commit.shard] = commit.failures

    def remove(self, shards: Collection[int]) -> None:
        """Remove the counts of shards whose commits were reverted. The log file was removed before the commits."""
        reverted = frozenset(shards)
        self._keep(lambda shard: shard not in reverted)
        self.num_written = 0

    def _keep(self, is_there: Callable[[int], bool]) -> None:
        """Remove the counts of shards without a commit; the log is then due to be written."""
        is_kept = bytearray(map(is_there, self.shards))
        if not all(is_kept):
            for values in self._columns:
                values[:] = array(values.typecode, compress(values, is_kept))
            self.failures = {shard: counts for shard, counts in self.failures.items() if is_there(shard)}
            self.num_written = 0

    @property
    def is_due(self) -> bool:
        """True if there are many new commits since the log was written."""
        return len(self.shards) - self.num_written >= _COMMITS_A_WRITE

    def write(self) -> None:
        """Write the log if it has changed; needs the lease."""
        if len(self.shards) > self.num_written:
            self.commits.run.store.write(COMMIT_LOG, self._to_parquet())
            self.num_written = len(self.shards)

    def _to_parquet(self) -> bytes:
        arrays = [
            pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
            for kind, values in zip(_COLUMNS.types[:-1], self._columns, strict=True)
        ]
        arrays.append(pa.array(map(self._failures_text, self.shards), pa.string()))
        about = {"version": VERSION, "end": self._end}
        table = pa.table(arrays, _COLUMNS.with_metadata({"flux_batch": json.dumps(about)})).sort_by("shard")
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()

    def _failures_text(self, shard: int) -> str | None:
        return json.dumps(self.failures[shard]) if shard in self.failures else None

    @classmethod
    def saved(cls, commits: Commits) -> tuple[CommitLog, int]:
        """Read the saved log and its end; an empty log and 0 if there is none that can be used."""
        store = commits.run.store
        try:
            found, end = cls._from_parquet(commits, store.read(COMMIT_LOG))
        except NotFound:
            return cls(commits), 0
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: not used, the commits are read instead (%s)", store.url(COMMIT_LOG), error)
            return cls(commits), 0
        if found.shards and all(store.exists(commits.key(shard)) for shard in {found.shards[0], found.shards[-1]}):
            return found, end
        log.warning("%s: names commits that are gone, so the commits are read instead", store.url(COMMIT_LOG))
        return cls(commits), 0

    @classmethod
    def _from_parquet(cls, commits: Commits, data: bytes) -> tuple[CommitLog, int]:
        file = pq.ParquetFile(pa.BufferReader(data))
        about = json.loads(file.schema_arrow.metadata[b"flux_batch"])
        if about["version"] != VERSION or not file.schema_arrow.equals(_COLUMNS):
            raise ValueError("of another version")
        found, end, num_shards = cls(commits), int(about["end"]), commits.run.num_shards
        for rows in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
            found._add_rows(rows)
        if end < 0 or min(found.shards, default=0) < 0 or any(one >= next_ for one, next_ in pairwise(found.shards)):
            raise ValueError("its shards do not fit together")
        found.num_written = len(found.shards)
        found._keep(range(num_shards).__contains__)  # a driver may have extended the plan after it was read here
        return found, min(end, num_shards)

    def _add_rows(self, rows: pa.RecordBatch) -> None:
        """Add rows of a log. Raises: ValueError if they have gaps."""
        *counts, failures = rows.columns
        for values, column in zip(self._columns, counts, strict=True):
            if column.null_count:
                raise ValueError("it has gaps")
            start, end = (values.itemsize * at for at in (column.offset, column.offset + len(column)))
            values.frombytes(memoryview(column.buffers()[1]).cast("B")[start:end])  # copies without Python objects
        for row in rows.select(["shard", "failures"]).filter(failures.is_valid()).to_pylist():
            self.failures[row["shard"]] = json.loads(row["failures"])


def check_all_committed(commits: Commits) -> None:
    """Raise Interrupted if a shard has no commit, whatever the log says. Needs the lease.

    The log is then removed.
    """
    unlisted = list(commits.listed().missing)
    missing = set(unlisted) - {commit.shard for commit in commits.find_all(unlisted)}  # a listing may be stale
    if missing:
        commits.run.store.delete(COMMIT_LOG)
        raise Interrupted(
            f"{commits.run.store.uri}: {len(missing)} commits were removed, among them that of shard {min(missing)}; "
            "run the same command again, which makes their shards"
        )
