"""The content of a gallery, read only from the output of a run: thumbnails of a sample of its images, and their rows.

A missing or damaged image becomes a note on the page; a storage outage is an error.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

from flux_batch.config.schema import SOURCE_COLUMNS, ImageConfig
from flux_batch.errors import JobError, NotFound, StoreError
from flux_batch.images import SUFFIXES, encode
from flux_batch.output.formats import MAX_SOURCE_BYTES, OutputFormat
from flux_batch.output.paths import SUCCESS, TRAIN, is_within
from flux_batch.report.gallery.rows import (
    GalleryRow,
    Row,
    ShardCounts,
    count_shards,
    read_failed_rows,
    read_rows,
    sample,
)
from flux_batch.report.saved_run import SavedRun
from flux_batch.sampling_params import MAX_SIDE
from flux_batch.storage.store import Store

# The page contains its images, about 20 kB each: more of them would be too much for a browser.
_MAX_IMAGES = 2000
MAX_FAILED = 200
# The number of files to read at once; each has one image in memory.
_FILES_AT_ONCE = 4
# Twice the width of a card on the page, for high-density screens.
_THUMBNAIL_SIDE = 384
_THUMBNAIL = ImageConfig(type="webp", quality=85)
_PILLOW_FORMATS = tuple(image_type.upper() for image_type in SUFFIXES)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small copy of an image as WebP, labelled as AI generated like its original; sides in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """An image on the page: its row, and its thumbnail or the reason why it has none."""

    row: Row
    thumbnail: Thumbnail | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSize:
    """The size and the progress of a run; `num_images` counts successful images."""

    name: str
    num_images: int
    num_failed: int
    num_committed: int
    num_shards: int
    is_complete: bool

    def summary(self, num_shown: int) -> str:
        """Return one line of plain text: the name of the run, the part that is shown, and the progress."""
        return f"{self.name}: {self.state(num_shown)}"

    def state(self, num_shown: int) -> str:
        """Return the part of the run that is shown and its progress, as text."""
        some = "" if num_shown == self.num_images else f"{num_shown:,} of "
        state = "complete" if self.is_complete else f"{self.num_committed:,} of {self.num_shards:,} shards committed"
        images = "image" if self.num_images == 1 else "images"
        return f"{some}{self.num_images:,} {images}, {self.num_failed:,} failed; {state}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery(RunSize):
    """The part of a run that is shown on a single page; `columns` None shows those in which images differ."""

    images: Sequence[GalleryImage]
    failed: Sequence[Row]
    columns: Sequence[str] | None = None


def run_size(run: SavedRun, counts: Sequence[ShardCounts]) -> dict[str, Any]:
    """Return the fields of RunSize."""
    return {
        "name": run.config.name,
        "num_images": sum(each.num_images for each in counts),
        "num_failed": sum(each.num_failed for each in counts),
        "num_committed": len(counts),
        "num_shards": run.num_shards,
        "is_complete": run.store.exists(SUCCESS),
    }


def read_gallery(store: Store, max_images: int, columns: Sequence[str] | None = None) -> Gallery:
    """Choose and read the sample of a run. Raises: JobError, StoreError."""
    if not 1 <= max_images <= _MAX_IMAGES:
        raise JobError(f"--max-images {max_images}: must be from 1 to {_MAX_IMAGES}")
    run = SavedRun.open(store)
    commits = run.commits
    counts = count_shards(commits)
    numbers = sample(counts, max_images)
    output_format = run.output_format
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        rows = chain.from_iterable(pool.map(lambda shard: read_rows(commits, shard, numbers[shard]), numbers))
        files = pool.map(lambda rows: list(read_file(store, output_format, rows)), by_file(rows))
        images = list(chain.from_iterable(files))
    check_columns(columns, {name for each in images if not each.problem for name in each.row})
    return Gallery(
        **run_size(run, counts),
        images=images,
        failed=read_failed_rows(commits, counts, MAX_FAILED),
        columns=columns,
    )


def by_file(rows: Iterable[GalleryRow]) -> list[list[GalleryRow]]:
    """Group rows by the file of their image, in the same order."""
    files: dict[str, list[GalleryRow]] = {}
    for each in rows:
        files.setdefault(str(each.row.get("file_name") or each.row["key"]), []).append(each)
    return list(files.values())


def read_file(store: Store, output_format: OutputFormat, rows: Sequence[GalleryRow]) -> Iterator[GalleryImage]:
    """Yield the images of rows that share one file; unreadable images have the reason instead."""
    file_name = str(rows[0].row.get("file_name") or "")
    readable = {str(each.row["key"]): each.row for each in rows if not each.problem}
    thumbnails: dict[str, Thumbnail | str] = {}
    parts: dict[str, list[bytes]] = {}
    problem = ""
    try:
        if readable:
            _check_file_name(file_name)
            sources = output_format.sources
            sizes = {key: int(row["bytes"]) for key, row in readable.items()}
            sizes |= {f"{key}.{source}": MAX_SOURCE_BYTES for key in readable for source in sources}
            for name, data in output_format.read_images(store, file_name, sizes):
                key = name.partition(".")[0] if sources else name
                parts.setdefault(key, []).append(data)
                if len(parts[key]) > len(sources):
                    thumbnails[key] = _thumbnail_or_problem(parts.pop(key), readable[key])
    except NotFound:
        problem = f"{file_name} is missing"
    except StoreError:
        raise
    except Exception as error:  # readers raise anything for a damaged file; other files are still shown
        problem = f"{file_name} is damaged ({type(error).__name__})"
    for each in rows:
        result = thumbnails.get(str(each.row["key"]), each.problem or problem or f"it is not in {file_name}")
        yield GalleryImage(each.row, problem=result) if isinstance(result, str) else GalleryImage(each.row, result)


def _check_file_name(file_name: str) -> None:
    """Raise ValueError unless a file is in the folder of images: rows are not trusted."""
    if not is_within(file_name, TRAIN):
        raise ValueError(f"{file_name} does not lie in {TRAIN}")


def _thumbnail_or_problem(images: Sequence[bytes], row: Row) -> Thumbnail | str:
    try:
        return _make_thumbnail(images, row)
    except ValueError as error:
        return str(error)


def _make_thumbnail(images: Sequence[bytes], row: Row) -> Thumbnail:
    """Shrink a stored image to at most 384 pixels a side; a smaller one keeps its size.

    images: its bytes, then those of its source images, which are drawn to its left. Raises: ValueError with the reason
    if it cannot be shown: bytes other than recorded, not an image, or too large.
    """
    digests = [hashlib.sha256(data).hexdigest() for data in images]
    recorded = [row.get("sha256")] + ([row.get(SOURCE_COLUMNS[0])] if len(images) > 1 else [])
    if [digests[0], *([", ".join(digests[1:])] if len(images) > 1 else [])] != recorded:
        raise ValueError("its bytes differ from those in the metadata")
    small = [_shrunk(data) for data in (*images[1:], images[0])]
    height = max(each.height for each in small)
    pixels = np.full((height, sum(each.width for each in small), 3), 255, np.uint8)
    left = 0
    for each in small:
        pixels[: each.height, left : left + each.width] = np.asarray(each)
        left += each.width
    return Thumbnail(encode(pixels, _THUMBNAIL, {}), left, height)


def _shrunk(data: bytes) -> Image.Image:
    """Return a stored image in RGB, with sides of at most 384 pixels. Raises: ValueError."""
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise ValueError(f"it is larger than {MAX_SIDE} pixels a side")
            image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
            return image.convert("RGB")
    except ValueError:
        raise
    except Exception as error:  # decoders raise anything for damaged bytes; only this image is not shown
        raise ValueError(f"it cannot be decoded ({type(error).__name__})") from error


def check_columns(columns: Sequence[str] | None, known: Collection[str]) -> None:
    """Raise JobError for an unknown column. A run without images has no known columns."""
    if unknown := [name for name in columns or () if known and name not in known]:
        raise JobError(f"--columns {unknown[0]}: no such column in the metadata; there are {', '.join(sorted(known))}")
