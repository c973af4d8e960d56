"""The rows of a run that a gallery shows: a sample spread evenly over all commits, and the first failures.

Only the log of commits and the metadata of shards in the sample are read, however large the run is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flux_batch.errors import NotFound, StoreError
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.commits import Commits
from flux_batch.output.metadata import unpack_metadata
from flux_batch.output.paths import ANNOTATIONS, failed_file, metadata_file

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """The numbers of images and of failed rows in a committed shard."""

    shard: int
    num_images: int
    num_failed: int


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """The metadata row of an image to show; if it is unreadable, a row with only the key, and the problem."""

    row: Row
    problem: str = ""


def count_shards(commits: Commits) -> list[ShardCounts]:
    """Count the images and failures of each committed shard, in order. Raises: DamagedObject."""
    log = CommitLog.read(commits)
    counts = zip(log.shards, log.num_images, log.num_failed, strict=True)
    return [ShardCounts(shard, num_all - num_failed, num_failed) for shard, num_all, num_failed in sorted(counts)]


def spread(total: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `total`, at even distances."""
    num = min(most, total)
    return [(2 * number + 1) * total // (2 * num) for number in range(num)]


def sample(counts: Sequence[ShardCounts], most: int) -> dict[int, list[int]]:
    """Choose at most `most` images at even distances. Returns: shard -> indices of its images."""
    chosen: dict[int, list[int]] = {}
    first = 0
    numbers = iter(spread(sum(each.num_images for each in counts), most))
    number = next(numbers, None)
    for each in counts:
        while number is not None and number < first + each.num_images:
            chosen.setdefault(each.shard, []).append(number - first)
            number = next(numbers, None)
        first += each.num_images
    return chosen


def read_rows(commits: Commits, shard: int, numbers: Sequence[int]) -> list[GalleryRow]:
    """Read the metadata rows of some images of a shard, by their indices."""
    name = commits.run.shard_name(shard)
    rows, problem = read_table(commits, metadata_file(name))
    images = [row for row in rows if row.get("status") == "success"]
    problem = problem or "the metadata has fewer images than the commit"
    unknown = GalleryRow({"key": f"shard {name}"}, problem)
    return [GalleryRow(images[number]) if number < len(images) else unknown for number in numbers]


def read_failed_rows(commits: Commits, counts: Sequence[ShardCounts], most: int) -> list[Row]:
    """Read the first `most` failed rows of a run."""
    failed: list[Row] = []
    for each in counts:
        if len(failed) >= most:
            break
        if each.num_failed:
            name = commits.run.shard_name(each.shard)
            rows, problem = read_table(commits, failed_file(name))
            failed += rows or [{"id": f"shard {name}", "error_type": "", "error_message": problem}]
    return failed[:most]


def read_table(commits: Commits, key: str) -> tuple[list[dict[str, Any]], str]:
    """Read a table of a shard. Returns: its rows, or the reason why there are none."""
    try:
        return unpack_metadata(commits.run.store.read(key)), ""
    except NotFound:
        return [], f"{key} is missing"
    except StoreError:
        raise
    except Exception as error:  # Arrow raises anything for damaged bytes; a gallery shows the rest
        return [], f"{key} is damaged ({type(error).__name__})"


def read_annotations(commits: Commits, names: Sequence[str], shard: int) -> dict[str, dict[str, Any]]:
    """Read the annotations of a shard. Returns: key -> `annotator.column` -> value."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        rows, _ = read_table(commits, f"{ANNOTATIONS}/{name}/{commits.run.shard_name(shard)}.parquet")
        for row in rows:
            values = {f"{name}.{column}": value for column, value in row.items() if column != "key"}
            found.setdefault(str(row.get("key")), {}).update(values)
    return found


def annotators(commits: Commits) -> list[str]:
    """Return the names of a run's annotations."""
    return sorted(name for name, size in commits.run.store.children(ANNOTATIONS).items() if size is None)
