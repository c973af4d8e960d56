"""The shards of a plan, stored in columns; a Shard object is created on access."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import eq
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from flux_batch.records import FileRange, Shard

# One row for each part of a shard; `file` is the name of a prompts file, relative to the data set.
_COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("start", pa.int64()),
        ("num_rows", pa.int32()),
        ("offset", pa.int64()),
        ("line", pa.int64()),
    ]
)
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True, eq=False, slots=True)
class Shards(Sequence[Shard]):
    """The shards of a plan, or some of them, in order.

    A shard takes some 30 bytes here, and a thousand as an object. `parts` has the columns above for every shard of the
    plan, numbered from 0. `ends` has the row after each shard's last part, `uris` the address of each file, `numbers`
    the shards that belong to this sequence.
    """

    parts: pa.RecordBatch
    ends: pa.Int32Array
    uris: Mapping[str, str]
    numbers: Sequence[int]

    @classmethod
    def from_columns(cls, parts: pa.Table, uris: Mapping[str, str]) -> Shards:
        """Return the shards that a table of parts describes; old tables have no column `line`."""
        if "line" not in parts.column_names:
            parts = parts.append_column("line", pa.repeat(0, len(parts)))
        batch = parts.cast(_COLUMNS).combine_chunks().to_batches()
        rows = batch[0] if batch else pa.RecordBatch.from_pylist([], _COLUMNS)
        ends = pc.run_end_encode(rows["shard"]).run_ends if rows.num_rows else pa.array([], pa.int32())
        return cls(rows, ends, uris, range(len(ends)))

    @classmethod
    def none(cls) -> Shards:
        """Return an empty sequence."""
        return cls.from_columns(_COLUMNS.empty_table(), {})

    def extended(self, parts: Iterable[Sequence[FileRange]]) -> Shards:
        """Return these shards and new ones after them, with the next numbers."""
        uris = dict(self.uris)
        tables = [pa.Table.from_batches([self.parts])]
        rows = _rows(parts, len(self.ends), uris)
        while some := list(islice(rows, ROWS_AT_ONCE)):
            tables.append(pa.Table.from_pylist(some, _COLUMNS))
        return Shards.from_columns(pa.concat_tables(tables).unify_dictionaries(), uris)

    def without(self, is_done: Sequence[int]) -> Shards:
        """Return the shards that are left; `is_done` has a 1 for each finished shard of the plan."""
        return replace(self, numbers=array("i", (number for number in self.numbers if not is_done[number])))

    @property
    def num_rows(self) -> int:
        """The number of rows of these shards."""
        if len(self.numbers) == len(self.ends):
            return int(pc.sum(self.parts["num_rows"]).as_py() or 0)
        ends = self.row_ends
        return sum(ends[number] - (ends[number - 1] if number else 0) for number in self.numbers)

    @property
    def row_ends(self) -> list[int]:
        """The number of rows up to the end of each shard of the plan."""
        sums = pc.cumulative_sum(self.parts["num_rows"].cast(pa.int64()))
        ends: list[int] = sums.take(pc.subtract(self.ends, 1)).to_pylist()
        return ends

    @property
    def files(self) -> list[str]:
        """The names of the files in the plan, in order."""
        names: list[str] = pc.unique(self.parts["file"]).to_pylist()
        return names

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.numbers)

    @overload
    def __getitem__(self, position: int) -> Shard: ...
    @overload
    def __getitem__(self, position: slice) -> Shards: ...
    def __getitem__(self, position: int | slice) -> Shard | Shards:
        """Return a shard, or the shards of a slice."""
        if isinstance(position, slice):
            return replace(self, numbers=self.numbers[position])
        number = self.numbers[position]
        start = self.ends[number - 1].as_py() if number else 0
        rows = self.parts.slice(start, self.ends[number].as_py() - start).to_pylist()
        return Shard(index=number, parts=tuple(self._part(row) for row in rows))

    def __eq__(self, other: object) -> bool:
        """Return whether another sequence has the same shards."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def _part(self, row: Mapping[str, Any]) -> FileRange:
        name = row["file"]
        return FileRange(
            uri=self.uris[name],
            name=name,
            start=row["start"],
            num_rows=row["num_rows"],
            offset=row["offset"],
            line=row["line"],
        )


def _rows(shards: Iterable[Sequence[FileRange]], first: int, uris: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield one row per part of a shard; add the address of its file to `uris`."""
    for number, parts in enumerate(shards, start=first):
        for part in parts:
            uris[part.name] = part.uri
            yield {
                "shard": number,
                "file": part.name,
                "start": part.start,
                "num_rows": part.num_rows,
                "offset": part.offset,
                "line": part.line,
            }
