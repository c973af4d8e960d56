"""The files of all shards as listed: the bytes of each by its shard, and what else lies in their folders."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flux_batch.output.formats import OutputFormat
from flux_batch.output.paths import COMMITS, FAILED, METADATA, TRAIN, RunFolder
from flux_batch.storage.entries import Entry

_ABSENT = -1


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """A folder with a file a shard, listed once, in 8 bytes a shard.

    sizes: the bytes of each shard's file, -1 without one. others: what is not the file of a shard of the plan, by name;
    None is a folder.
    """

    run: RunFolder
    folder: str
    suffix: str
    sizes: array[int]
    others: dict[str, int | None]

    @classmethod
    def list(cls, run: RunFolder, folder: str, suffix: str, *, with_sizes: bool = True) -> ShardFiles:
        """List a folder; without sizes every file has some number of bytes from 0 on. Raises: StoreError."""
        width = len(run.shard_name(0))

        def take(entries: Iterable[Entry]) -> ShardFiles:
            sizes, others = array("q", [_ABSENT]) * run.num_shards, {}
            for name, size in entries:
                stem = name[:width]
                # As RunFolder.shard_of, in a third of its time.
                is_number = size is not None and stem.isdecimal() and stem.isascii() and name[width:] == suffix
                if is_number and len(stem) == width and (shard := int(stem)) < run.num_shards:
                    sizes[shard] = size or 0
                else:
                    others[name] = size
            return cls(run, folder, suffix, sizes, others)

        return run.store.scan(folder, take, with_sizes=with_sizes)

    def __contains__(self, shard: object) -> bool:
        """Return whether a shard has its file."""
        return isinstance(shard, int) and 0 <= shard < len(self.sizes) and self.sizes[shard] != _ABSENT

    def __iter__(self) -> Iterator[int]:
        """Yield the shards that have their file, in order."""
        return (shard for shard, size in enumerate(self.sizes) if size != _ABSENT)

    @property
    def missing(self) -> Iterator[int]:
        """The shards that do not have their file, in order."""
        return (shard for shard, size in enumerate(self.sizes) if size == _ABSENT)

    def name(self, shard: int) -> str:
        """Return the name of a shard's file in the folder."""
        return f"{self.run.shard_name(shard)}{self.suffix}"

    def size(self, name: str) -> int | None:
        """Return the bytes of a file by its name; None if it is not there, or a folder."""
        shard = self.run.shard_of(name, self.suffix)
        return self.sizes[shard] if shard is not None and shard in self else self.others.get(name)


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
            commits or list_commits(run),
            ShardFiles.list(run, TRAIN, suffix),
            ShardFiles.list(run, METADATA, ".parquet"),
            ShardFiles.list(run, FAILED, ".parquet", with_sizes=False),
        )


def list_commits(run: RunFolder) -> ShardFiles:
    """List the commits of a run, without their sizes. Raises: StoreError."""
    return ShardFiles.list(run, COMMITS, ".json", with_sizes=False)
