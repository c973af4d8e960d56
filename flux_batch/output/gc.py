"""Leftovers: the objects of an output that no commit names, half-written, staged in vain, not committed or unknown.

Looks at the folders of a run alone, `train`, `metadata` and `_run`: whatever else lies beside them is somebody else's.
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

# Folders that are listed, or commits that are read, at once.
_THREADS = 16
# The files and folders of this program in RUN.
_OF_RUN = {ANNOTATING, BATCH_SIZE, COMMIT_LOG, COMPILE_CACHE, GALLERY, JOB, PLAN, PRECISION, PROGRESS, REPORT}
_OF_RUN |= {COMMITS, FAILED, LEASE, REPORT_PAGE, REVERTING, SELECTIONS, STAGING, STORE_TMP}

# A file whose write never ended; staged images that nobody needs any more; files of a shard that is not committed,
# and still may be; a file that no run puts there.
_LeftoverKind = Literal["half-written", "staged", "uncommitted", "stray"]


@dataclass(frozen=True, slots=True)
class _Leftover:
    """An object that no commit names; `shard` is the one it seems to belong to, if any.

    With `upload` it is no object yet: parts of one, whose writer was killed.
    """

    key: str
    kind: _LeftoverKind
    shard: int | None = None
    upload: Upload | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a run, each folder listed once, the commits first."""

    commits: ShardFiles
    data: ShardFiles
    tables: ShardFiles
    failures: ShardFiles

    @classmethod
    def of(
        cls, run: RunFolder, output_format: OutputFormat | None = None, commits: ShardFiles | None = None
    ) -> Listing:
        """List the folders of a run, that of the commits unless it has been; a format saves memory.

        Without one, all that lies in `train` is among the others. Raises: StoreError.
        """
        suffix = output_format.location("").removeprefix(f"{TRAIN}/") if output_format else ""
        return cls(
            commits or Commits(run).listed(),
            ShardFiles.list(run, TRAIN, suffix),
            ShardFiles.list(run, METADATA, ".parquet"),
            ShardFiles.list(run, FAILED, ".parquet", with_sizes=False),
        )


def logged_shards(run: RunFolder, listing: Listing, log: CommitLog) -> bytearray:
    """Return 1 for each committed shard whose files have the bytes of the log.

    Its commit need not be read: it names them. A shard with failures has a table of them, too.
    """
    is_logged = bytearray(run.num_shards)
    tables, failures = listing.tables.sizes, listing.failures.sizes
    for shard, num_bytes, num_failed in zip(log.shards, log.num_bytes, log.num_failed, strict=True):
        if shard in listing.commits:  # a damaged log may name shards that the plan has not
            data = max(0, listing.data.sizes[shard])  # no file if all images failed
            is_listed = tables[shard] >= 0 and data + tables[shard] == num_bytes
            is_logged[shard] = is_listed and (failures[shard] >= 0) == (num_failed > 0)
    return is_logged


def find_leftovers(
    run: RunFolder, listing: Listing | None = None, is_named: bytearray | None = None
) -> Iterator[_Leftover]:
    """Yield every leftover. Those that are `uncommitted` may be committed by a worker meanwhile.

    listing: the files of the run, for a caller that has listed them. is_named: 1 for each shard whose commit is known
    to name its one file in `train`, and is not read for it.
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
    """Return the uploads in parts of a run's own objects that were not completed."""
    return [upload for upload in store.unfinished_uploads() if is_of_run(store.key_of(upload))]


def remove_leftovers(run: RunFolder, output_format: OutputFormat, leftovers: Sequence[_Leftover]) -> int:
    """Remove leftovers; needs the lease. Returns: the number of those that were removed.

    A worker of a driver that is gone may have committed its shard since it was listed, and then its files stay; or it
    commits it while they are being removed: such a commit is reverted, so that `run` makes the shard.
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
    """Return those of these shards that have a commit now, whatever an earlier listing says."""
    keys = [commit_file(run.shard_name(shard)) for shard in shards]
    return {shard for shard, is_there in zip(shards, pool.map(run.store.exists, keys), strict=True) if is_there}


def _unknown_files(run: RunFolder, commits: ShardFiles) -> Iterator[_Leftover]:
    """Yield what is not of this program among its own files."""
    for name, size in run.store.children(RUN).items():
        if f"{RUN}/{name}" not in _OF_RUN:
            yield from _strays(run, f"{RUN}/{name}", size)
    for name, size in commits.others.items():
        yield from _strays(run, f"{COMMITS}/{name}", size)


def _strays(run: RunFolder, key: str, size: int | None) -> Iterator[_Leftover]:
    """Yield a file, or those of a folder."""
    return (_Leftover(each, "stray") for each in (_files_in(run, key) if size is None else [key]))


def _files_in(run: RunFolder, folder: str) -> Sequence[str]:
    """Return the keys under a folder; none behind a link, where files of others may lie."""
    return () if run.store.is_link(folder) else run.store.list(folder)


def _staged(run: RunFolder, done: Container[int]) -> Iterator[_Leftover]:
    """Yield staged images of shards that are done, or that the plan does not have."""
    for name, size in run.store.children(STAGING).items():
        folder, shard = f"{STAGING}/{name}", run.shard_of(name)
        if size is not None:
            yield _Leftover(folder, "stray")
        elif shard is None or shard in done:
            yield from (_Leftover(key, "staged") for key in _files_in(run, folder))


def _tables(run: RunFolder, tables: ShardFiles, done: Container[int]) -> Iterator[_Leftover]:
    """Yield the tables of shards that are not done, and what is no table."""
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
    """Return the files that the commit of a shard names; None if it cannot be read, and none of them may go."""
    try:
        return {file.path for file in parse_commit(run.store.read(commit_file(run.shard_name(shard)))).files}
    except (NotFound, ValueError):
        return None
