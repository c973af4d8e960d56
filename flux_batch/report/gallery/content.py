"""What a gallery shows of a run, read from its output alone: a sample of the images, small, each with its row.

An image that is missing or damaged is a note; an outage of the storage is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flux_batch.errors import JobError, NotFound, StoreError
from flux_batch.output.formats import OutputFormat
from flux_batch.output.paths import SUCCESS, TRAIN, is_within
from flux_batch.report.gallery.rows import Chosen, Row, chosen_rows, failed_rows, spread, tallies
from flux_batch.report.gallery.thumbnail import Thumbnail, make_thumbnail
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store

# The page holds its images, some 20 kB each: more than this no browser should be asked to open.
MOST_IMAGES = 2000
MAX_FAILED = 200
# Files read at once; each holds one image at a time.
READERS = 4


@dataclass(frozen=True, slots=True)
class Shown:
    """An image on the page: its row, and a small copy or the reason why there is none."""

    row: Row
    thumbnail: Thumbnail | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """What is shown of a run, and how much there is; `columns` are asked for, None for those that differ."""

    name: str
    shown: Sequence[Shown]
    num_made: int
    failed: Sequence[Row]
    num_failed: int
    num_committed: int
    num_shards: int
    is_complete: bool
    columns: Sequence[str] | None = None

    def summary(self, num_shown: int) -> str:
        """Say how much is shown of how much, in one line of plain text."""
        some = "" if num_shown == self.num_made else f"{num_shown:,} of "
        state = "complete" if self.is_complete else f"{self.num_committed:,} of {self.num_shards:,} shards committed"
        return f"{self.name}: {some}{self.num_made:,} images, {self.num_failed:,} failed; {state}"


def read_gallery(store: Store, max_images: int, columns: Sequence[str] | None = None) -> Gallery:
    """Choose and read what is shown of a run. Raises: JobError, StoreError."""
    if not 1 <= max_images <= MOST_IMAGES:
        raise JobError(f"--max-images {max_images}: must be from 1 to {MOST_IMAGES}")
    run = SavedRun.open(store)
    commits = run.commits
    counts = tallies(commits)
    places = spread(counts, max_images)

    def read(chosen: Sequence[Chosen]) -> list[Shown]:
        return list(_read_file(store, run.output_format, chosen))

    with ThreadPoolExecutor(READERS) as pool:
        rows = pool.map(lambda shard: chosen_rows(commits, shard, places[shard]), places)
        files = _by_file(chosen for some in rows for chosen in some)
        shown = [
            each
            for some in pool.map(lambda file: list(_read_file(store, run.output_format, file)), files)
            for each in some
        ]
    _check_columns(columns, shown)
    return Gallery(
        name=run.config.name,
        shown=shown,
        num_made=sum(tally.num_made for tally in counts),
        failed=failed_rows(commits, counts, MAX_FAILED),
        num_failed=sum(tally.num_failed for tally in counts),
        num_committed=len(counts),
        num_shards=run.num_shards,
        is_complete=store.exists(SUCCESS),
        columns=columns,
    )


def _by_file(chosen: Iterator[Chosen]) -> list[list[Chosen]]:
    """Put together what one file has; the order stays."""
    files: dict[str, list[Chosen]] = {}
    for each in chosen:
        files.setdefault(str(each.row.get("file_name") or each.row["key"]), []).append(each)
    return list(files.values())


def _read_file(store: Store, output_format: OutputFormat, chosen: Sequence[Chosen]) -> Iterator[Shown]:
    """Read the images that one file has; those that cannot be read are shown with the reason."""
    file_name = str(chosen[0].row.get("file_name") or "")
    readable = {str(each.row["key"]): each.row for each in chosen if not each.problem}
    thumbnails: dict[str, Thumbnail | str] = {}
    problem = ""
    try:
        if readable:
            _check_place(file_name)
            sizes = {key: int(row["bytes"]) for key, row in readable.items()}
            for key, data in output_format.read_images(store, file_name, sizes):
                thumbnails[key] = _thumbnail(data, readable[key])
    except NotFound:
        problem = f"{file_name} is missing"
    except StoreError:
        raise
    except Exception as error:  # whatever is said of a file that is none of its kind; the others are shown
        problem = f"{file_name} is damaged ({type(error).__name__})"
    for each in chosen:
        found = thumbnails.get(str(each.row["key"]), each.problem or problem or f"it is not in {file_name}")
        yield Shown(each.row, problem=found) if isinstance(found, str) else Shown(each.row, found)


def _thumbnail(data: Any, row: Row) -> Thumbnail | str:
    try:
        return make_thumbnail(data, row)
    except ValueError as error:
        return str(error)


def _check_place(file_name: str) -> None:
    """Raise ValueError unless a file lies where images do: rows are data, and may say anything."""
    if not is_within(file_name, TRAIN):
        raise ValueError(f"{file_name} is no place for images")


def _check_columns(columns: Sequence[str] | None, shown: Sequence[Shown]) -> None:
    known = {name for each in shown if not each.problem for name in each.row}
    if unknown := [name for name in columns or () if known and name not in known]:
        raise JobError(f"--columns {unknown[0]}: no such column in the metadata; there are {', '.join(sorted(known))}")
