"""What lies in an output and no commit names: half-written, staged in vain, not committed, or strange.

Looks at the folders of a run alone, `train`, `metadata` and `_run`: what else lies beside them is somebody else's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from flux_batch.errors import NotFound
from flux_batch.output.commits import Commits, parse_commit
from flux_batch.output.layouts import shard_name
from flux_batch.output.paths import (
    BATCH_SIZE,
    COMMITS,
    COMPILE_CACHE,
    FAILED,
    JOB,
    LEASE,
    PLAN,
    PRECISION,
    PROGRESS,
    REPORT,
    STAGING,
    TAKEN_BACK,
)
from flux_batch.output.revert import remove_shard
from flux_batch.storage.store import SCRATCH, Store

log = logging.getLogger(__name__)

READERS = 16
RUN_FOLDER = "_run"
OWN = {BATCH_SIZE, COMPILE_CACHE, JOB, PLAN, PRECISION, PROGRESS, REPORT}
OWN |= {COMMITS, FAILED, LEASE, SCRATCH, STAGING, TAKEN_BACK}

# A file whose write never ended; staged images that nobody needs any more; files of a shard that is not committed,
# which may still be; what no run puts there.
Kind = Literal["half-written", "staged", "uncommitted", "stray"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """An object that no commit names; `shard` is whose it would be, if that can be told."""

    key: str
    kind: Kind
    shard: int | None = None


@dataclass(frozen=True)
class Leftovers:
    """Finds what no commit names, in the store of a run."""

    store: Store
    num_shards: int

    def find(self) -> Iterator[Leftover]:
        """Yield every leftover. What a worker commits meanwhile may be among those that are `uncommitted`."""
        done = self._commits.done()
        yield from self._strangers()
        yield from (Leftover(key, "half-written") for key in self.store.list(SCRATCH))
        yield from self._staged(done)
        for folder in ("metadata", FAILED):
            yield from self._of_tables(folder, done)
        yield from self._of_data(done)

    def sweep(self, found: list[Leftover]) -> int:
        """Remove leftovers; needs the lease. Returns: how many there were.

        A worker of a driver that is gone may commit its shard while its files are being removed: such a commit is
        taken back, so that `run` makes the shard.
        """
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda leftover: self.store.delete(leftover.key), found))
        uncommitted = {leftover.shard for leftover in found if leftover.kind == "uncommitted"} - {None}
        for shard in self._commits.done() & uncommitted:
            log.warning("shard %d was committed while its files were removed; `run` makes it again", shard)
            remove_shard(self.store, self.num_shards, shard)
        return len(found)

    @property
    def _commits(self) -> Commits:
        return Commits(self.store, self.num_shards)

    def _strangers(self) -> Iterator[Leftover]:
        """Find what is not of this program among its own files."""
        for name, size in self.store.children(RUN_FOLDER).items():
            if (key := f"{RUN_FOLDER}/{name}") not in OWN:
                yield from (Leftover(each, "stray") for each in (self.store.list(key) if size is None else [key]))
        for name in self.store.children(COMMITS):
            if not self._is_shard(name.removesuffix(".json")) or not name.endswith(".json"):
                yield Leftover(f"{COMMITS}/{name}", "stray")

    def _staged(self, done: set[int]) -> Iterator[Leftover]:
        """Find staged images of shards that are done, or are none."""
        for name, size in self.store.children(STAGING).items():
            folder = f"{STAGING}/{name}"
            if size is not None:
                yield Leftover(folder, "stray")
            elif not self._is_shard(name) or int(name) in done:
                yield from (Leftover(key, "staged") for key in self.store.list(folder))

    def _of_tables(self, folder: str, done: set[int]) -> Iterator[Leftover]:
        """Find the tables, one a shard, of shards that are not done."""
        for name, size in self.store.children(folder).items():
            key, stem = f"{folder}/{name}", name.removesuffix(".parquet")
            if size is None:
                yield from (Leftover(each, "stray") for each in self.store.list(key))
            elif not self._is_shard(stem) or stem == name:
                yield Leftover(key, "stray")
            elif int(stem) not in done:
                yield Leftover(key, "uncommitted", int(stem))

    def _of_data(self, done: set[int]) -> Iterator[Leftover]:
        """Find images that no commit names; in a folder a shard, or one file a shard."""
        with ThreadPoolExecutor(READERS) as pool:
            entries = self.store.children("train").items()
            for some in pool.map(lambda entry: self._of_entry(entry[0], entry[1], done), entries):
                yield from some

    def _of_entry(self, name: str, size: int | None, done: set[int]) -> list[Leftover]:
        stem = name if size is None else PurePosixPath(name).stem
        keys = self.store.list(f"train/{name}") if size is None else [f"train/{name}"]
        if not self._is_shard(stem):
            return [Leftover(key, "stray") for key in keys]
        shard = int(stem)
        if shard not in done:
            return [Leftover(key, "uncommitted", shard) for key in keys]
        named = self._named(shard)
        return [] if named is None else [Leftover(key, "stray", shard) for key in keys if key not in named]

    def _named(self, shard: int) -> set[str] | None:
        """Read which files the commit of a shard names; None if it cannot be told, and none of them may go."""
        try:
            return {file.path for file in parse_commit(self.store.read(self._commits.key(shard))).files}
        except (NotFound, ValueError):
            return None

    def _is_shard(self, name: str) -> bool:
        return name.isdecimal() and int(name) < self.num_shards and shard_name(int(name), self.num_shards) == name
