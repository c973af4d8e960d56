"""Leftovers: the objects of an output that no commit names, half-written, staged in vain, not committed or unknown.

Looks at the folders of a run alone, `train`, `metadata` and `_run`: whatever else lies beside them is somebody else's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flux_batch.errors import NotFound
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
    commit_file,
    is_of_run,
)
from flux_batch.output.revert import remove_shard
from flux_batch.storage.multipart import Upload
from flux_batch.storage.store import STORE_TMP, Store

log = logging.getLogger(__name__)

# Lists a folder: names, with the size of a file and None for a folder.
Children: TypeAlias = Callable[[str], Mapping[str, int | None]]

# Objects that are listed, or removed, at once.
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


def find_leftovers(run: RunFolder, named: Container[str] = (), children: Children | None = None) -> Iterator[_Leftover]:
    """Yield every leftover. Those that are `uncommitted` may be committed by a worker meanwhile.

    named: the files directly in `train` that commits are known to name, which are not read for them. children: lists a
    folder, as Store.children does; for a caller that has listed some of them already.
    """
    children = children or run.store.children
    done = Commits(run).done()
    yield from _unknown_files(run, children)
    yield from (_Leftover(key, "half-written") for key in run.store.list(STORE_TMP))
    for upload in unfinished_uploads(run.store):
        yield _Leftover(run.store.key_of(upload), "half-written", upload=upload)
    yield from _staged(run, done)
    for folder in (METADATA, FAILED):
        yield from _tables(run, folder, done, children)
    yield from _data_files(run, done, named, children)


def unfinished_uploads(store: Store) -> list[Upload]:
    """Return the uploads in parts of a run's own objects that were not completed."""
    return [upload for upload in store.unfinished_uploads() if is_of_run(store.key_of(upload))]


def remove_leftovers(run: RunFolder, output_format: OutputFormat, leftovers: Sequence[_Leftover]) -> int:
    """Remove leftovers; needs the lease. Returns: their number.

    A worker of a driver that is gone may commit its shard while its files are being removed: such a commit is
    reverted, so that `run` makes the shard.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda leftover: _remove(run, leftover), leftovers))
    uncommitted = {leftover.shard for leftover in leftovers if leftover.kind == "uncommitted"} - {None}
    for shard in Commits(run).done() & uncommitted:
        log.warning("shard %d was committed while its files were removed; `run` makes it again", shard)
        remove_shard(run, output_format, shard)
    return len(leftovers)


def _remove(run: RunFolder, leftover: _Leftover) -> None:
    if leftover.upload:
        run.store.abort(leftover.upload)
    else:
        run.store.delete(leftover.key)


def _unknown_files(run: RunFolder, children: Children) -> Iterator[_Leftover]:
    """Yield what is not of this program among its own files."""
    for name, size in children(RUN).items():
        if (key := f"{RUN}/{name}") not in _OF_RUN:
            yield from (_Leftover(each, "stray") for each in (run.store.list(key) if size is None else [key]))
    for name in children(COMMITS):
        if run.shard_of(name, ".json") is None:
            yield _Leftover(f"{COMMITS}/{name}", "stray")


def _staged(run: RunFolder, done: set[int]) -> Iterator[_Leftover]:
    """Yield staged images of shards that are done, or that the plan does not have."""
    for name, size in run.store.children(STAGING).items():
        folder, shard = f"{STAGING}/{name}", run.shard_of(name)
        if size is not None:
            yield _Leftover(folder, "stray")
        elif shard is None or shard in done:
            yield from (_Leftover(key, "staged") for key in run.store.list(folder))


def _tables(run: RunFolder, folder: str, done: set[int], children: Children) -> Iterator[_Leftover]:
    """Yield the tables, one a shard, of shards that are not done."""
    for name, size in children(folder).items():
        key, shard = f"{folder}/{name}", run.shard_of(name, ".parquet")
        if size is None:
            yield from (_Leftover(each, "stray") for each in run.store.list(key))
        elif shard is None:
            yield _Leftover(key, "stray")
        elif shard not in done:
            yield _Leftover(key, "uncommitted", shard)


def _data_files(run: RunFolder, done: set[int], named: Container[str], children: Children) -> Iterator[_Leftover]:
    """Yield files of images that no commit names; a shard has one file, or a folder."""
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = [entry for entry in children(TRAIN).items() if entry[0] not in named]
        for leftovers in pool.map(lambda entry: _data_of_shard(run, entry[0], entry[1], done), entries):
            yield from leftovers


def _data_of_shard(run: RunFolder, name: str, size: int | None, done: set[int]) -> list[_Leftover]:
    keys = run.store.list(f"{TRAIN}/{name}") if size is None else [f"{TRAIN}/{name}"]
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
