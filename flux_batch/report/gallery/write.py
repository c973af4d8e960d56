"""The gallery of a run: a page with its images and settings, and a contact sheet, both written into its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flux_batch.errors import JobError
from flux_batch.output.paths import ANNOTATIONS, GALLERY, metadata_file
from flux_batch.report.gallery.chunks import Choose, ChunkWriter, write_file
from flux_batch.report.gallery.content import Gallery, RunSize, check_columns, read_gallery, run_size
from flux_batch.report.gallery.page import render_page
from flux_batch.report.gallery.rows import (
    Row,
    ShardCounts,
    annotators,
    count_shards,
    read_annotations,
    read_table,
    sample,
)
from flux_batch.report.gallery.sheet import MAX_IMAGES as SHEET_IMAGES
from flux_batch.report.gallery.sheet import draw_sheet
from flux_batch.report.gallery.viewer import ShownRun, render_viewer
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store

PAGE = f"{GALLERY}/index.html"
SHEET = f"{GALLERY}/contact-sheet.jpg"
# A browser has the rows of all images in memory, about 500 MB for this number.
_MAX_IMAGES = 200_000
_MAX_FAILED = 10_000
# The folders for the chunks of the run, and of the second run beside it.
_RUN, _BESIDE = "run", "beside"


def write_gallery(
    store: Store,
    max_images: int,
    columns: Sequence[str] | None = None,
    beside: Store | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShownRun:
    """Write PAGE, the chunks beside it and SHEET into the output of a run; an earlier gallery is replaced.

    columns: shown under each image. beside: the output of another run; its images of the same rows are shown beside
    those of this run. on_progress: called with the numbers of finished shards and of all shards.
    Returns: the run that is shown. Raises: JobError if there is no run, for a number out of range, or a column that no
    image has; StoreError.
    """
    if not 1 <= max_images <= _MAX_IMAGES:
        raise JobError(f"--max-images {max_images}: must be from 1 to {_MAX_IMAGES}")
    run = SavedRun.open(store)
    other = SavedRun.open(beside) if beside else None
    counts = count_shards(run.commits)
    check_columns(columns, _known_columns(run, counts) if counts and columns else ())
    other_counts = count_shards(other.commits) if other else []
    chosen = _Chosen(counts, max_images)
    shards, others = chosen.shards, [each.shard for each in other_counts]
    progress = _Progress(len(shards) + len(others), on_progress)
    shown = [_write_run(store, run, counts, shards, _RUN, chosen.of_shard, progress.add)]
    if other:
        shown.append(_write_run(store, other, other_counts, others, _BESIDE, chosen.beside, progress.add))
    write_file(store, SHEET, draw_sheet(read_gallery(store, min(max_images, SHEET_IMAGES))))
    write_file(store, PAGE, render_viewer(shown, columns).encode())
    _remove_others(store, {PAGE, SHEET, *(key for each in shown for key in each.chunks.keys)})
    return shown[0]


def write_single_file(
    store: Store,
    max_images: int,
    columns: Sequence[str] | None = None,
    further: Callable[[Row], Mapping[str, Any]] | None = None,
) -> Gallery:
    """Write PAGE as one file with its images inside, and SHEET; an earlier gallery is replaced.

    further: a function that returns further columns of a row. Returns: the gallery that is shown. Raises: the errors of
    `write_gallery`.
    """
    gallery = read_gallery(store, max_images, columns)
    if further:
        images = [replace(image, row={**image.row, **further(image.row)}) for image in gallery.images]
        gallery = replace(gallery, images=images)
    write_file(store, SHEET, draw_sheet(gallery))
    write_file(store, PAGE, render_page(gallery).encode())
    _remove_others(store, {PAGE, SHEET})
    return gallery


def format_gallery(store: Store, size: RunSize, num_shown: int) -> str:
    """Return three lines for people: the summary, and the addresses of the page and the sheet."""
    return f"{size.summary(num_shown)}\npage          {store.url(PAGE)}\ncontact sheet {store.url(SHEET)}"


class _Chosen:
    """The rows to show: images evenly spread over the run, and its first failures.

    They are stored by id and index, to choose the same images of the second run.
    """

    def __init__(self, counts: Sequence[ShardCounts], max_images: int) -> None:
        self._numbers = sample(counts, max_images)
        self._num_failed: dict[int, int] = {}  # failed rows to show, by shard
        left = _MAX_FAILED
        for each in counts:
            self._num_failed[each.shard] = min(left, each.num_failed)
            left -= self._num_failed[each.shard]
        self._identities: set[tuple[str, int]] = set()

    @property
    def shards(self) -> list[int]:
        """The shards with rows to show, in order."""
        return [shard for shard, num_failed in self._num_failed.items() if num_failed or shard in self._numbers]

    def of_shard(self, shard: int, rows: Sequence[Row]) -> Iterable[Row]:
        numbers = set(self._numbers.get(shard, ()))
        number, failed_left = 0, self._num_failed.get(shard, 0)
        for row in rows:
            if row.get("status") == "success":
                is_shown = number in numbers
                number += 1
            else:
                is_shown = failed_left > 0
                failed_left -= 1
            if is_shown:
                self._identities.add(_identity(row))
                yield row

    def beside(self, shard: int, rows: Sequence[Row]) -> Iterable[Row]:
        return [row for row in rows if _identity(row) in self._identities]


class _Progress:
    """A count of finished shards."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def add(self) -> None:
        self._done += 1
        self._on_progress(self._done, self._total)


def _known_columns(run: SavedRun, counts: Sequence[ShardCounts]) -> set[str]:
    """Return the columns of the metadata and of each annotation, read from its first shard."""
    rows, _ = read_table(run.commits, metadata_file(run.name(counts[0].shard)))
    known = {name for row in rows[:1] for name in row}
    for name in annotators(run.commits):
        annotated = run.store.children(f"{ANNOTATIONS}/{name}")
        shards = [each.shard for each in counts if f"{run.name(each.shard)}.parquet" in annotated]
        for said in read_annotations(run.commits, [name], shards[0]).values() if shards else ():
            known |= said.keys()
    return known


def _identity(row: Row) -> tuple[str, int]:
    return str(row.get("id")), int(row.get("image_index") or 0)


def _write_run(
    store: Store,
    run: SavedRun,
    counts: Sequence[ShardCounts],
    shards: Sequence[int],
    folder: str,
    choose: Choose,
    on_shard: Callable[[], None],
) -> ShownRun:
    writer = ChunkWriter(run, store, f"{GALLERY}/{folder}", choose)
    written = writer.write(shards, on_shard)
    return ShownRun(**run_size(run, counts), folder=folder, chunks=written, original=_original(run))


def _original(run: SavedRun) -> str:
    """Return the template of image addresses with shard and key; "" if images have no files of their own."""
    if run.config.output.format != "files":
        return ""
    return f"../../{run.output_format.file_name('{shard}', '{key}')}"


def _remove_others(store: Store, keys: set[str]) -> None:
    """Remove the files of an earlier gallery that are not in `keys`."""
    store.delete_many([key for key in store.list(GALLERY) if key not in keys])
