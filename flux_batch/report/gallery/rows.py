"""Which rows of a run a gallery shows: images spread evenly over all that are committed, and the first failures.

Of a large run only the shards that were chosen are read; of the others, their commits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flux_batch.errors import NotFound, StoreError
from flux_batch.output.commits import Commits
from flux_batch.output.metadata import unpack_metadata
from flux_batch.output.paths import failed_file, metadata_file

Row: TypeAlias = Mapping[str, Any]

# Commits in memory at once: one of a run in single files names hundreds of files.
COMMITS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Tally:
    """How many images a committed shard has, and how many of its rows failed."""

    shard: int
    num_made: int
    num_failed: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """An image to show: its metadata row; if that cannot be read, why, and a row of a key alone."""

    row: Row
    problem: str = ""


def tallies(commits: Commits) -> list[Tally]:
    """Count what each committed shard has, in order. Raises: StoreError for a damaged commit."""
    done = sorted(commits.done())
    return [
        Tally(commit.shard, commit.num_images - commit.num_failed, commit.num_failed)
        for first in range(0, len(done), COMMITS_AT_ONCE)
        for commit in commits.read_all(done[first : first + COMMITS_AT_ONCE])
    ]


def spread(counts: Sequence[Tally], most: int) -> dict[int, list[int]]:
    """Choose at most `most` images at even distances. Returns: shard -> which of its made images, from 0."""
    total = sum(tally.num_made for tally in counts)
    num = min(most, total)
    places = iter((2 * number + 1) * total // (2 * num) for number in range(num))
    chosen: dict[int, list[int]] = {}
    place, first = next(places, None), 0
    for tally in counts:
        while place is not None and place < first + tally.num_made:
            chosen.setdefault(tally.shard, []).append(place - first)
            place = next(places, None)
        first += tally.num_made
    return chosen


def chosen_rows(commits: Commits, shard: int, places: Sequence[int]) -> list[Chosen]:
    """Read the metadata rows of some of the images of a shard."""
    name = commits.run.shard_name(shard)
    rows, problem = _rows(commits, metadata_file(name))
    made = [row for row in rows if row.get("status") == "success"]
    problem = problem or "the metadata has fewer images than the commit"
    return [Chosen(made[place]) if place < len(made) else Chosen({"key": f"shard {name}"}, problem) for place in places]


def failed_rows(commits: Commits, counts: Sequence[Tally], most: int) -> list[Row]:
    """Read the first `most` failed rows."""
    found: list[Row] = []
    for tally in counts:
        if len(found) >= most:
            break
        if tally.num_failed:
            name = commits.run.shard_name(tally.shard)
            rows, problem = _rows(commits, failed_file(name))
            found += rows or [{"id": f"shard {name}", "error_type": "", "error_message": problem}]
    return found[:most]


def _rows(commits: Commits, key: str) -> tuple[list[dict[str, Any]], str]:
    """Read a table of a shard. Returns: its rows, or why there are none."""
    try:
        return unpack_metadata(commits.run.store.read(key)), ""
    except NotFound:
        return [], f"{key} is missing"
    except StoreError:
        raise
    except Exception as error:  # whatever Arrow says of bytes that are no table; a gallery shows the rest
        return [], f"{key} is damaged ({type(error).__name__})"
