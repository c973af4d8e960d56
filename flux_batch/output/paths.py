"""The names of all files of a run, relative to its output; README.md in this folder shows them.

They must never be renamed, so that old runs can be resumed. The format (formats.py) names the files of images in TRAIN.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flux_batch.storage.entries import Entry
from flux_batch.storage.store import Store

# The size of a missing file.
_ABSENT = -1

# The images: a file or a folder for each shard. Their records: a file for each shard.
TRAIN = "train"
METADATA = "metadata"
# Columns about the images, added later: a folder for each annotator, in it a file for each shard.
ANNOTATIONS = "annotations"
CARD = "README.md"
SUCCESS = "_SUCCESS"

# All names below belong to the run; readers of the data set do not need them.
RUN = "_run"
JOB = f"{RUN}/job.yaml"
PLAN = f"{RUN}/plan.parquet"
COMMITS = f"{RUN}/commits"
# The counts of the commits, so that not all commits must be read.
COMMIT_LOG = f"{RUN}/commit_log.parquet"
FAILED = f"{RUN}/failed"
PROGRESS = f"{RUN}/progress.json"
# The driver of the run: one small object for each epoch; the last one counts.
LEASE = f"{RUN}/lease"
REPORT = f"{RUN}/report.json"
REPORT_PAGE = f"{RUN}/report.html"
GALLERY = f"{RUN}/gallery"
# Finished images of shards that are not committed yet: a folder for each shard.
STAGING = f"{RUN}/staging"
# Notes about commits that are being reverted; the next driver finishes these reverts.
REVERTING = f"{RUN}/taken-back"
# The number of images in a forward pass, if the run measured it.
BATCH_SIZE = f"{RUN}/batch_size.json"
# The dtype and the kernels of the first worker.
PRECISION = f"{RUN}/precision.json"
# Objects that the first worker of a run writes for all others.
SETTLED = (BATCH_SIZE, PRECISION)
# Code that torch.compile built on one worker, for the others: an object for each kind of device.
COMPILE_CACHE = f"{RUN}/compile_cache"
# The annotators, the commits of annotations, and finished rows of those that are not committed yet.
ANNOTATING = f"{RUN}/annotations"
# Selections of images, by name.
SELECTIONS = f"{RUN}/selections"


def shard_name(shard: int, num_shards: int) -> str:
    """Return the name of a shard: five digits, more if the run has more than 99,999."""
    return f"{shard:0{max(5, len(str(num_shards - 1)))}d}"


def number_in(name: str, suffix: str = "") -> int | None:
    """Return the number in a name such as `00012.json`; None if it is not a number followed by `suffix`."""
    stem = name.removesuffix(suffix)
    return int(stem) if stem.isdecimal() and name.endswith(suffix) else None


def image_key(shard: str, row: int, image_index: int) -> str:
    """Return the key of an image: shard and row digits, `_1` and so on for further images of the row; no dots."""
    return f"{shard}{row:04d}" + (f"_{image_index}" if image_index else "")


def metadata_file(shard: str) -> str:
    """Return the name of a shard's metadata: one row for every requested image, failed ones included."""
    return f"{METADATA}/{shard}.parquet"


def failed_file(shard: str) -> str:
    """Return the name of the copy of a shard's failed rows. It exists only if rows failed."""
    return f"{FAILED}/{shard}.parquet"


def commit_file(shard: str) -> str:
    """Return the name of a shard's commit."""
    return f"{COMMITS}/{shard}.json"


def is_within(path: str, *folders: str) -> bool:
    """Return whether a path stays inside one of `folders`; paths in stored files are not trusted."""
    return any(path.startswith(f"{folder}/") for folder in folders) and ".." not in path.split("/")


def is_of_run(key: str) -> bool:
    """Return whether a run writes under this key; other tools, and other runs in subfolders, may share its folder."""
    return key in (CARD, SUCCESS) or is_within(key, TRAIN, METADATA, ANNOTATIONS, RUN)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run and the number of its shards, which determines their names."""

    store: Store
    num_shards: int

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard, as in the names of its files."""
        return shard_name(shard, self.num_shards)

    def shard_of(self, name: str, suffix: str = "") -> int | None:
        """Return the shard that a file or folder is named after; None if it is not one of the plan."""
        shard = number_in(name, suffix)
        is_named = shard is not None and shard < self.num_shards and f"{self.shard_name(shard)}{suffix}" == name
        return shard if is_named else None


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The listing of a folder with a file for each shard. It takes 8 bytes a shard.

    sizes: the bytes of each shard's file, -1 without one. others: the sizes of all other entries by name; None for a
    folder.
    """

    run: RunFolder
    folder: str
    suffix: str
    sizes: array[int]
    others: dict[str, int | None]

    @classmethod
    def list(cls, run: RunFolder, folder: str, suffix: str, *, with_sizes: bool = True, first: int = 0) -> ShardFiles:
        """List a folder from the shard `first` on.

        Without sizes, the sizes of existing files are arbitrary numbers from 0 on. Raises: StoreError.
        """
        width = len(run.shard_name(0))
        after = f"{run.shard_name(first - 1)}{suffix}" if first else ""

        def take(entries: Iterable[Entry]) -> ShardFiles:
            sizes, others = array("q", [_ABSENT]) * run.num_shards, {}
            for name, size in entries:
                stem = name[:width]
                # The same as RunFolder.shard_of, in a third of the time.
                is_number = size is not None and stem.isdecimal() and stem.isascii() and name[width:] == suffix
                if is_number and len(stem) == width and (shard := int(stem)) < run.num_shards:
                    sizes[shard] = size or 0
                else:
                    others[name] = size
            return cls(run, folder, suffix, sizes, others)

        return run.store.scan(folder, take, after=after, with_sizes=with_sizes)

    def __contains__(self, shard: object) -> bool:
        """Return whether a shard has a file."""
        return isinstance(shard, int) and 0 <= shard < len(self.sizes) and self.sizes[shard] != _ABSENT

    def __iter__(self) -> Iterator[int]:
        """Yield the shards that have a file, in order."""
        return (shard for shard, size in enumerate(self.sizes) if size != _ABSENT)

    @property
    def missing(self) -> Iterator[int]:
        """The shards without a file, in order."""
        return (shard for shard, size in enumerate(self.sizes) if size == _ABSENT)

    def name(self, shard: int) -> str:
        """Return the name of a shard's file in the folder."""
        return f"{self.run.shard_name(shard)}{self.suffix}"

    def size(self, name: str) -> int | None:
        """Return the bytes of a file by its name; None if it is missing or a folder."""
        shard = self.run.shard_of(name, self.suffix)
        return self.sizes[shard] if shard is not None and shard in self else self.others.get(name)
