"""How a commit is taken back, so that `run` makes its shard again: whole, or finished by whoever comes next.

    1. staging      the good images of the shard, so that they need not be made again
    2. _SUCCESS     and the report are removed: the run is not complete any more
    3. note         _run/taken-back/NNNNN says what is going on
    4. commit       is removed: from here on no reader follows the files of the shard
    5. files        metadata, failed rows and data are removed
    6. note         is removed

Killed in 1 to 3, the shard is done as before, and its note says that it will be made again. Killed in 4 to 6, the next
driver finishes it before anything is made: files that were left would be taken for those of a worker that came first.
Needs the lease.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flux_batch.errors import NotFound
from flux_batch.output.commits import Commits
from flux_batch.output.layouts import (
    DAMAGE,
    Layout,
    failed_file,
    metadata_file,
    shard_name,
    stored_images,
    unpack_metadata,
)
from flux_batch.output.paths import REPORT, SUCCESS, TAKEN_BACK
from flux_batch.output.staging import StagedImage, Staging, staged_record
from flux_batch.storage.scratch import scratch_folder
from flux_batch.storage.store import Store

# Shards at once, and images of each in memory.
SHARDS_AT_ONCE = 4
IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class TakeBack:
    """Takes commits of a run back; what `layout` can still read of their images is kept in the staging area."""

    store: Store
    num_shards: int
    layout: Layout

    def __call__(self, shards: Sequence[int]) -> None:
        """Take back the commits of these shards, those that are no commits included. Safe to call twice."""
        if not shards:
            return
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            list(pool.map(self._keep, shards))
            for key in (SUCCESS, REPORT):
                self.store.delete(key)
            list(pool.map(lambda shard: remove_shard(self.store, self.num_shards, shard), shards))

    def finish(self) -> None:
        """Finish what a killed process began."""
        for name in self.store.children(TAKEN_BACK):
            if name.isdecimal():
                remove_shard(self.store, self.num_shards, int(name))

    def _keep(self, shard: int) -> None:
        """Stage the good images of a shard; without a commit it was taken back already, and they are."""
        if not self.store.exists(Commits(self.store, self.num_shards).key(shard)):
            return
        staging = Staging(self.store, self.num_shards)
        staging.remove(shard)
        with scratch_folder() as scratch:
            images = self._good_images(shard_name(shard, self.num_shards), scratch)
            while some := list(islice(images, IMAGES_AT_ONCE)):
                staging.put(shard, some)

    def _good_images(self, name: str, scratch: Path) -> Iterator[StagedImage]:
        """Yield the images that are what the metadata says of them, up to the first byte that cannot be read."""
        made = self._made(name)
        files: dict[str, Path] = {}
        for file in sorted({self.layout.file_name(name, key) for key in made}):
            with suppress(NotFound):
                files[file] = self.store.fetch(file, scratch)
        try:
            for key, data in stored_images(self.layout, name, files) if files else ():
                row = made.get(key)
                if row and row["sha256"] == hashlib.sha256(data).hexdigest():
                    yield StagedImage(key, staged_record(row), data)
        except DAMAGE:
            return

    def _made(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Read which images a shard should have: metadata rows by key; none if they cannot be read."""
        try:
            data = self.store.read(metadata_file(name))
        except NotFound:
            return {}
        try:
            return {row["key"]: row for row in unpack_metadata(data) if row["status"] == "success"}
        except DAMAGE:
            return {}


def remove_shard(store: Store, num_shards: int, shard: int) -> None:
    """Do steps 3 to 6 for one shard."""
    name = shard_name(shard, num_shards)
    note = f"{TAKEN_BACK}/{name}"
    store.write(note, b"")
    store.delete(Commits(store, num_shards).key(shard))
    for key in (metadata_file(name), failed_file(name), f"train/{name}.tar", f"train/{name}.parquet"):
        store.delete(key)
    store.delete_folder(f"train/{name}")
    store.delete(note)
