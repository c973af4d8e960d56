"""The data of a gallery in chunks, which its page loads as scripts: rows by columns, and thumbnails.

A page that is opened from a disk may run scripts that lie beside it, but not read files: each chunk is one call of a
function of the page (viewer.js), whose argument is JSON. Chunks are named after what is in them, so that writing a
gallery again makes only the thumbnails that are missing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from flux_batch.config.schema import SOURCE_COLUMNS
from flux_batch.output.paths import metadata_file
from flux_batch.report.gallery.content import by_file, read_file
from flux_batch.report.gallery.page import plain
from flux_batch.report.gallery.rows import GalleryRow, Row, annotators, read_annotations, read_table
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store

# Some 3 MB of rows, which a browser reads in a tenth of a second.
ROWS_PER_CHUNK = 10_000
# Some 300 kB of thumbnails: sorted by a column, each image on the screen is in a chunk of its own.
IMAGES_PER_CHUNK = 16
# Thumbnails of a shard that are in memory at once, and read in one walk through its file.
IMAGES_AT_ONCE = 32 * IMAGES_PER_CHUNK
# Shards that are read at once; each holds one image at a time, of Parquet a row group.
_SHARDS_AT_ONCE = min(16, max(4, os.cpu_count() or 1))
_MAX_PROMPT = 2000
_MAX_VALUE = 300
# Names those of the same images that are made in another way: to be raised with a change of size or quality.
_THUMBNAILS = 1
# What the page need not know of an image.
_NOT_SHOWN = {"sha256", "file_name", *SOURCE_COLUMNS}
_LARGEST_EXACT = 2**53
_TEXT_OR_INFINITY = re.compile(r'"(?:[^"\\]|\\.)*"|Infinity')

# The rows of a shard that are shown: its number and its metadata -> some of it, in order.
Choose: TypeAlias = Callable[[int, Sequence[Row]], Iterable[Row]]

T = TypeVar("T")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _ShownRow:
    """A row of the page, and where its thumbnail is: its chunk, empty without one, and the place in it."""

    row: Row
    chunk: str = ""
    place: int = 0


@dataclass(slots=True)
class WrittenChunks:
    """The keys of the chunks of rows, in order, and of thumbnails; the numbers of rows, and of images among them."""

    rows: list[str] = field(default_factory=list)
    thumbnails: set[str] = field(default_factory=set)
    num_rows: int = 0
    num_images: int = 0

    @property
    def keys(self) -> set[str]:
        """The keys of all."""
        return {*self.rows, *self.thumbnails}


@dataclass(frozen=True)
class ChunkWriter:
    """The writer of one run's chunks into `folder` of a store, perhaps another one."""

    run: SavedRun
    store: Store
    folder: str
    choose: Choose

    def write(self, shards: Sequence[int], on_shard: Callable[[], None]) -> WrittenChunks:
        """Write the chunks of some shards, several at once. Raises: StoreError."""
        names = annotators(self.run.commits)
        there = set(self.store.list(f"{self.folder}/thumbnails"))
        written = WrittenChunks()
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            shown = _in_order(pool, lambda shard: list(self._shard(shard, names, there)), shards)
            rows = _flattened(shown, on_shard)
            while some := list(islice(rows, ROWS_PER_CHUNK)):
                written.num_rows += len(some)
                written.num_images += sum(bool(each.chunk) for each in some)
                written.thumbnails |= {self._key(each.chunk) for each in some if each.chunk}
                written.rows.append(self._write_rows(some, len(written.rows)))
        return written

    def _shard(self, shard: int, names: Sequence[str], there: set[str]) -> Iterator[_ShownRow]:
        """Yield the rows of a shard, after its thumbnails are written."""
        name = self.run.name(shard)
        rows, problem = read_table(self.run.commits, metadata_file(name))
        if problem:
            yield _ShownRow(_unreadable({"key": f"shard {name}"}, problem))
            return
        chosen = list(self.choose(shard, rows))
        said = read_annotations(self.run.commits, names, shard) if chosen else {}
        made = [row for row in chosen if row.get("status") == "success"]
        outcomes: dict[str, _ShownRow] = {}
        for first in range(0, len(made), IMAGES_AT_ONCE):
            outcomes |= self._thumbnails(name, first, made[first : first + IMAGES_AT_ONCE], there)
        for row in chosen:
            outcome = outcomes.get(row["key"], _ShownRow(row))
            yield replace(outcome, row={**outcome.row, **said.get(row["key"], {})})

    def _thumbnails(self, shard: str, first: int, rows: Sequence[Row], there: set[str]) -> dict[str, _ShownRow]:
        """Write the thumbnails of images unless they are there. Returns: the rows by key."""
        starts = range(0, len(rows), IMAGES_PER_CHUNK)
        chunks = {
            f"{shard}/{(first + start) // IMAGES_PER_CHUNK}-{_digest_of(some)}": some
            for start in starts
            if (some := rows[start : start + IMAGES_PER_CHUNK])
        }
        missing = [name for name in chunks if self._key(name) not in there]
        wanted = [GalleryRow(row) for name in missing for row in chunks[name]]
        images = {
            each.row["key"]: each
            for some in by_file(wanted)
            for each in read_file(self.run.store, self.run.output_format, some)
        }
        shown: dict[str, _ShownRow] = {}
        for name, some in chunks.items():
            problems = {row["key"]: images[row["key"]].problem for row in some} if name in missing else {}
            if any(problems.values()):
                name += "-some"  # the next gallery tries again
            readable = [row for row in some if not problems.get(row["key"])]
            shown |= {row["key"]: _ShownRow(row, name, place) for place, row in enumerate(readable)}
            for key, problem in problems.items():
                if problem:
                    shown[key] = _ShownRow(_unreadable(images[key].row, problem))
            if problems:
                small = [images[key].thumbnail for key, problem in problems.items() if not problem]
                data = [base64.b64encode(each.data).decode() for each in small if each]
                write_file(self.store, self._key(name), f"gallery.thumbnails({json.dumps(data)});\n".encode())
        return shown

    def _write_rows(self, rows: Sequence[_ShownRow], number: int) -> str:
        """Write a chunk of rows. Its JSON is a text in the script, which browsers read faster than an expression."""
        text = _finite_json(json.dumps(_pack_rows(rows), separators=(",", ":")))
        escaped = text.replace("\\", "\\\\").replace("'", "\\'")
        data = f"gallery.rows('{escaped}');\n".encode()
        key = f"{self.folder}/rows/{number}-{hashlib.sha256(data).hexdigest()[:16]}.js"
        write_file(self.store, key, data)
        return key

    def _key(self, chunk: str) -> str:
        return f"{self.folder}/thumbnails/{chunk}.js"


def write_file(store: Store, key: str, data: bytes) -> None:
    """Write through a local file of the same name: a bucket takes the content type for browsers from its ending."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, key.rpartition("/")[2])
        path.write_bytes(data)
        store.write(key, path)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], _Result], items: Iterable[T], ahead: int = 2 * _SHARDS_AT_ONCE
) -> Iterator[_Result]:
    """Yield the results of items in their order; a few of them are ahead, not all as in `pool.map`."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _flattened(shards: Iterable[list[_ShownRow]], on_shard: Callable[[], None]) -> Iterator[_ShownRow]:
    for rows in shards:
        on_shard()
        yield from rows


def _digest_of(rows: Sequence[Row]) -> str:
    digests = [[str(row.get("sha256")), *filter(None, [row.get(name) for name in SOURCE_COLUMNS])] for row in rows]
    originals = "\n".join(" ".join(map(str, each)) for each in digests)
    return hashlib.sha256(f"{_THUMBNAILS}\n{originals}".encode()).hexdigest()[:16]


def _unreadable(row: Row, problem: str) -> Row:
    return {**row, "status": "unreadable", "error_type": "Unreadable", "error_message": problem}


def _pack_rows(rows: Sequence[_ShownRow]) -> dict[str, Any]:
    """Return rows by columns: JSON in which the same value does not stand twice, where that pays."""
    names = dict.fromkeys(name for each in rows for name in each.row if name not in _NOT_SHOWN)
    thumbnails: dict[str, list[tuple[int, int]]] = {}  # number of the row and place in the chunk
    for number, each in enumerate(rows):
        if each.chunk:
            thumbnails.setdefault(each.chunk, []).append((number, each.place))
    columns = {name: _pack([_cell(name, each.row.get(name)) for each in rows]) for name in names}
    return {"num": len(rows), "columns": columns, "thumbnails": thumbnails}


def _finite_json(text: str) -> str:
    """Return Python's JSON with infinite numbers as 1e999.

    It is a number of JSON, and JavaScript reads it as infinite.
    """
    if "Infinity" not in text:
        return text
    return _TEXT_OR_INFINITY.sub(lambda found: "1e999" if found[0] == "Infinity" else found[0], text)


def _pack(values: list[Any]) -> dict[str, Any]:
    """Return a column: one value of all rows, a code for each, or the values as they are."""
    distinct: dict[tuple[type, Any], int] = {}
    codes = [distinct.setdefault((type(value), value), len(distinct)) for value in values]
    if len(distinct) == 1:
        return {"all": values[0]}
    if len(distinct) <= len(values) // 4:
        return {"values": [value for _, value in distinct], "codes": codes}
    return {"each": values}


def _cell(name: str, value: Any) -> Any:
    """Return a value for JSON: a number that JavaScript has exactly, a truth value, null or a text that is cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= _LARGEST_EXACT:
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return plain(value, _MAX_PROMPT if name == "prompt" else _MAX_VALUE)
