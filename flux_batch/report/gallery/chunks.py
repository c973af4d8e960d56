"""The data of a gallery in chunks, which its page loads as scripts: rows by columns, and thumbnails.

A page that is opened from a disk can run scripts beside it, but cannot read files. So each chunk is a call of a
function of the page (viewer.js) with JSON as its argument. The name of a chunk depends on its content, so that writing
a gallery again makes only the missing thumbnails.
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

# About 3 MB of rows, which a browser reads in a tenth of a second.
ROWS_PER_CHUNK = 10_000
# About 300 kB of thumbnails, a small chunk, since images sorted by a column are each in another chunk.
IMAGES_PER_CHUNK = 16
# The number of a shard's thumbnails that are in memory at once, and are read in one pass over its file.
IMAGES_AT_ONCE = 32 * IMAGES_PER_CHUNK
# The number of shards to read at once; each has one image in memory, or of Parquet a row group.
_SHARDS_AT_ONCE = min(16, max(4, os.cpu_count() or 1))
_MAX_PROMPT = 2000
_MAX_VALUE = 300
# The version in the names of thumbnails: raise it when their size or quality changes.
_THUMBNAILS = 1
# Columns that the page does not need.
_NOT_SHOWN = {"sha256", "file_name", *SOURCE_COLUMNS}
_LARGEST_EXACT = 2**53
_TEXT_OR_INFINITY = re.compile(r'"(?:[^"\\]|\\.)*"|Infinity')

# A function that chooses the rows to show: (shard, its metadata rows) -> some of them, in order.
Choose: TypeAlias = Callable[[int, Sequence[Row]], Iterable[Row]]

T = TypeVar("T")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _ShownRow:
    """A row of the page, with the chunk of its thumbnail and its index there.

    The chunk is "" without a thumbnail.
    """

    row: Row
    chunk: str = ""
    place: int = 0


@dataclass(slots=True)
class WrittenChunks:
    """The keys of the chunks of rows, in order, and of thumbnails; the numbers of rows and images."""

    rows: list[str] = field(default_factory=list)
    thumbnails: set[str] = field(default_factory=set)
    num_rows: int = 0
    num_images: int = 0

    @property
    def keys(self) -> set[str]:
        """The keys of all chunks."""
        return {*self.rows, *self.thumbnails}


@dataclass(frozen=True)
class ChunkWriter:
    """The writer of a run's chunks into `folder` of its store or another run's."""

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
        """Write the thumbnails of images unless they exist. Returns: the rows by key."""
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
                name += "-some"  # another name, so that the next gallery tries again
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
        """Write a chunk of rows. Its JSON is a string in the script, which browsers parse faster than an expression."""
        text = _finite_json(json.dumps(_pack_rows(rows), separators=(",", ":")))
        escaped = text.replace("\\", "\\\\").replace("'", "\\'")
        data = f"gallery.rows('{escaped}');\n".encode()
        key = f"{self.folder}/rows/{number}-{hashlib.sha256(data).hexdigest()[:16]}.js"
        write_file(self.store, key, data)
        return key

    def _key(self, chunk: str) -> str:
        return f"{self.folder}/thumbnails/{chunk}.js"


def write_file(store: Store, key: str, data: bytes) -> None:
    """Write data through a local file of the same name: buckets derive the content type from its suffix."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, key.rpartition("/")[2])
        path.write_bytes(data)
        store.write(key, path)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], _Result], items: Iterable[T], ahead: int = 2 * _SHARDS_AT_ONCE
) -> Iterator[_Result]:
    """Yield the results of items in order. Only a few are computed ahead, not all as in `pool.map`."""
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
    """Return rows by columns for JSON. Repeated values are coded if that is shorter."""
    names = dict.fromkeys(name for each in rows for name in each.row if name not in _NOT_SHOWN)
    thumbnails: dict[str, list[tuple[int, int]]] = {}  # index of the row and index in the chunk
    for number, each in enumerate(rows):
        if each.chunk:
            thumbnails.setdefault(each.chunk, []).append((number, each.place))
    columns = {name: _pack([_cell(name, each.row.get(name)) for each in rows]) for name in names}
    return {"num": len(rows), "columns": columns, "thumbnails": thumbnails}


def _finite_json(text: str) -> str:
    """Return Python's JSON with infinite numbers as 1e999.

    This is valid JSON, and JavaScript reads it as Infinity.
    """
    if "Infinity" not in text:
        return text
    return _TEXT_OR_INFINITY.sub(lambda found: "1e999" if found[0] == "Infinity" else found[0], text)


def _pack(values: list[Any]) -> dict[str, Any]:
    """Return a column: one value for all rows, a code for each, or the plain values."""
    distinct: dict[tuple[type, Any], int] = {}
    codes = [distinct.setdefault((type(value), value), len(distinct)) for value in values]
    if len(distinct) == 1:
        return {"all": values[0]}
    if len(distinct) <= len(values) // 4:
        return {"values": [value for _, value in distinct], "codes": codes}
    return {"each": values}


def _cell(name: str, value: Any) -> Any:
    """Return a value for JSON: a number that is exact in JavaScript, a boolean, null or a shortened text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= _LARGEST_EXACT:
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return plain(value, _MAX_PROMPT if name == "prompt" else _MAX_VALUE)
