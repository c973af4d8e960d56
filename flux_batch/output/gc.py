"""Leftovers: the objects of an output that no commit names: half-written, staged, uncommitted or unknown.

Only the folders of a run (`train`, `metadata` and `_run`) are searched: other files beside them belong to others.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

from flux_batch.errors import NotFound
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.commits import Commits, parse_commit
from flux_batch.output.formats import OutputFormat
from flux_batch.output.paths import (
    ANNOTATING,
    BATCH_SIZE,
    COMMIT_LOG,
    COMMITS,
    COMPILE_CACHE,
    FAILED,
    GALLERY,
    JOB,
    LEASE,
    METADATA,
    PLAN,
    PRECISION,
    PROGRESS,
    REPORT,
    REPORT_PAGE,
    REVERTING,
    RUN,
    SELECTIONS,
    STAGING,
    TRAIN,
    RunFolder,
    ShardFiles,
    commit_file,
    is_of_run,
)
from flux_batch.output.revert import remove_shard
from flux_batch.storage.multipart import Upload
from flux_batch.storage.store import STORE_TMP, Store

log = logging.getLogger(__name__)

# The number of folders to list, or commits to read, at once.
_THREADS = 16
# The files and folders of this program in RUN.
_OF_RUN = {ANNOTATING, BATCH_SIZE, COMMIT_LOG, COMPILE_CACHE, GALLERY, JOB, PLAN, PRECISION, PROGRESS, REPORT}
_OF_RUN |= {COMMITS, FAILED, LEASE, REPORT_PAGE, REVERTING, SELECTIONS, STAGING, STORE_TMP}

# In this order: a file whose write never ended; staged images that are no longer needed; files of a shard that is not
# committed, but may still be; a file that no run writes there.
_LeftoverKind = Literal["half-written", "staged", "uncommitted", "stray"]


@dataclass(frozen=True, slots=True)
class _Leftover:
    """An object that no commit names; `shard` is the shard that it seems to belong to, if any.

    With `upload` it is an unfinished multipart upload, whose writer was killed.
    """

    key: str
    kind: _LeftoverKind
    shard: int | None = None
    upload: Upload | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a run, with each folder listed once, the commits first."""

    commits: ShardFiles
    data: ShardFiles
    tables: ShardFiles
    failures: ShardFiles

    @classmethod
    def of(
        cls, run: RunFolder, output_format: OutputFormat | None = None, commits: ShardFiles | None = None
    ) -> Listing:
        """List the folders of a run. commits: the listing of the commits, if the caller has it.

        output_format: saves memory; without it, all entries of `train` count as `others`. Raises: StoreError.
        """
        suffix = output_format.location("").removeprefix(f"{TRAIN}/") if output_format else ""
        return cls(
            commits or Commits(run).listed(),
            ShardFiles.list(run, TRAIN, suffix),
            ShardFiles.list(run, METADATA, ".parquet"),
            ShardFiles.list(run, FAILED, ".parquet", with_sizes=False),
        )


def logged_shards(run: RunFolder, listing: Listing, log: CommitLog) -> bytearray:
    """Return 1 for each committed shard whose files have the sizes in the log.

    The commit of such a shard names these files and need not be read. A shard with failures has a table of them, too.
    """
    is_logged = bytearray(run.num_shards)
    tables, failures = listing.tables.sizes, listing.failures.sizes
    for shard, num_bytes, num_failed in zip(log.shards, log.num_bytes, log.num_failed, strict=True):
        if shard in listing.commits:  # a damaged log may name shards outside the plan
            data = max(0, listing.data.sizes[shard])  # no file if all images failed
            is_listed = tables[shard] >= 0 and data + tables[shard] == num_bytes
            is_logged[shard] = is_listed and (failures[shard] >= 0) == (num_failed > 0)
    return is_logged


def find_leftovers(
    run: RunFolder, listing: Listing | None = None, is_named: bytearray | None = None
) -> Iterator[_Leftover]:
    """Yield every leftover. A worker may commit an `uncommitted` one meanwhile.

    listing: the files of the run, if the caller has listed them. is_named: 1 for each shard whose commit is known to
    name its only file in `train`, so that the commit need not be read.
    """
    listing = listing or Listing.of(run)
    yield from _unknown_files(run, listing.commits)
    yield from (_Leftover(key, "half-written") for key in run.store.list(STORE_TMP))
    for upload in unfinished_uploads(run.store):
        yield _Leftover(run.store.key_of(upload), "half-written", upload=upload)
    yield from _staged(run, listing.commits)
    for tables in (listing.tables, listing.failures):
        yield from _tables(run, tables, listing.commits)
    yield from _data_files(run, listing.data, listing.commits, is_named)


def unfinished_uploads(store: Store) -> list[Upload]:
    """Return the unfinished multipart uploads of a run's own objects."""
    return [upload for upload in store.unfinished_uploads() if is_of_run(store.key_of(upload))]


def remove_leftovers(run: RunFolder, output_format: OutputFormat, leftovers: Sequence[_Leftover]) -> int:
    """Remove leftovers; needs the lease. Returns: the number of removed ones.

    A worker of a former driver may have committed its shard after the listing: its files then stay. If it commits the
    shard while files are being removed, the commit is reverted, so that `run` makes the shard again.
    """
    shards = {leftover.shard for leftover in leftovers if leftover.kind == "uncommitted" and leftover.shard is not None}
    with ThreadPoolExecutor(_THREADS) as pool:
        shards -= _committed(run, shards, pool)
        some = [leftover for leftover in leftovers if leftover.kind != "uncommitted" or leftover.shard in shards]
        list(pool.map(run.store.abort, [leftover.upload for leftover in some if leftover.upload]))
        run.store.delete_many([leftover.key for leftover in some if not leftover.upload])
        for shard in sorted(_committed(run, shards, pool)):
            log.warning("shard %d was committed while its files were removed; `run` makes it again", shard)
            remove_shard(run, output_format, shard)
    return len(some)


def _committed(run: RunFolder, shards: Collection[int], pool: ThreadPoolExecutor) -> set[int]:
    """Return the shards that have a commit now, whatever an earlier listing says."""
    keys = [commit_file(run.shard_name(shard)) for shard in shards]
    return {shard for shard, is_there in zip(shards, pool.map(run.store.exists, keys), strict=True) if is_there}


def _unknown_files(run: RunFolder, commits: ShardFiles) -> Iterator[_Leftover]:
    """Yield files in the run's folders that this program does not write."""
    for name, size in run.store.children(RUN).items():
        if f"{RUN}/{name}" not in _OF_RUN:
            yield from _strays(run, f"{RUN}/{name}", size)
    for name, size in commits.others.items():
        yield from _strays(run, f"{COMMITS}/{name}", size)


def _strays(run: RunFolder, key: str, size: int | None) -> Iterator[_Leftover]:
    """Yield a stray file, or the files of a stray folder."""
    return (_Leftover(each, "stray") for each in (_files_in(run, key) if size is None else [key]))


def _files_in(run: RunFolder, folder: str) -> Sequence[str]:
    """Return the keys under a folder; none behind a link, which may lead to files of others."""
    return () if run.store.is_link(folder) else run.store.list(folder)


def _staged(run: RunFolder, done: Container[int]) -> Iterator[_Leftover]:
    """Yield staged images of shards that are done or not in the plan."""
    for name, size in run.store.children(STAGING).items():
        folder, shard = f"{STAGING}/{name}", run.shard_of(name)
        if size is not None:
            yield _Leftover(folder, "stray")
        elif shard is None or shard in done:
            yield from (_Leftover(key, "staged") for key in _files_in(run, folder))


def _tables(run: RunFolder, tables: ShardFiles, done: Container[int]) -> Iterator[_Leftover]:
    """Yield the tables of shards that are not done, and files that are not tables."""
    for shard in tables:
        if shard not in done:
            yield _Leftover(f"{tables.folder}/{tables.name(shard)}", "uncommitted", shard)
    for name, size in tables.others.items():
        yield from _strays(run, f"{tables.folder}/{name}", size)


def _data_files(
    run: RunFolder, data: ShardFiles, done: Container[int], is_named: bytearray | None
) -> Iterator[_Leftover]:
    """Yield files of images that no commit names; a shard has one file, or a folder."""
    entries = [(data.name(shard), data.sizes[shard]) for shard in data if not (is_named and is_named[shard])]
    with ThreadPoolExecutor(_THREADS) as pool:
        look = partial(_data_of_shard, run, done)
        for leftovers in pool.map(look, chain(entries, data.others.items())):
            yield from leftovers


def _data_of_shard(run: RunFolder, done: Container[int], entry: tuple[str, int | None]) -> list[_Leftover]:
    name, size = entry
    keys = _files_in(run, f"{TRAIN}/{name}") if size is None else [f"{TRAIN}/{name}"]
    shard = run.shard_of(name if size is None else name.partition(".")[0])
    if shard is None:
        return [_Leftover(key, "stray") for key in keys]
    if shard not in done:
        return [_Leftover(key, "uncommitted", shard) for key in keys]
    committed = _committed_files(run, shard)
    return [] if committed is None else [_Leftover(key, "stray", shard) for key in keys if key not in committed]


def _committed_files(run: RunFolder, shard: int) -> set[str] | None:
    """Return the files that a shard's commit names; None if it cannot be read, so that all must stay."""
    try:
        return {file.path for file in parse_commit(run.store.read(commit_file(run.shard_name(shard)))).files}
    except (NotFound, ValueError):
        return None
