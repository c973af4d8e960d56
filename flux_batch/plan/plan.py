"""The plan: data set -> ordered shards, made once from row counts and saved.

Planned shards never change; new files only append shards. This module knows row counts and reads no prompt. A resumed
run loads the plan and checks that the files are the same.
"""

from __future__ import annotations

import base64
import io
import json
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from html import escape
from random import SystemRandom

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.config.schema import JobConfig, PromptsConfig
from flux_batch.errors import PlanMismatch, SourceError, count_of
from flux_batch.output.paths import shard_name
from flux_batch.plan.shards import Shards
from flux_batch.prompts.formats.table import RowRange
from flux_batch.prompts.listing import LISTING_RULES, PromptFile, skipped_notes
from flux_batch.prompts.source import PromptSource
from flux_batch.records import FileRange

_READER_THREADS = 16
FILES_AT_ONCE = 1000
# Rows of a saved plan that are converted to Python objects at a time.
_PARTS_AT_ONCE = 10_000
# The errors that reading a damaged plan raises.
_DAMAGED = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)
# The numbers of shards shown in a notebook, and of changed files listed in an error.
_SHARDS_SHOWN, _FILES_SHOWN = 20, 20


@dataclass(frozen=True, repr=False)
class Plan:
    """The shards of a run in order, its files, and the types of passthrough columns.

    `rules` is the version of the rules by which the files were listed, `lists` that of the samplers' lists of values.
    `notes` says which files were left out when the plan was made, and why, and which columns are unused.
    """

    shards: Shards
    files: tuple[PromptFile, ...]
    passthrough: pa.Schema
    rules: int = LISTING_RULES
    lists: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        return f"Plan({self.num_prompts} prompts of {len(self.files)} files in {len(self.shards)} shards)"

    def _repr_html_(self) -> str:
        """Return the first shards as a table, for a notebook."""
        parts = [(shard.index, part) for shard in self.shards[:_SHARDS_SHOWN] for part in shard.parts]
        rows = "".join(
            f"<tr><td>{index}</td><td>{escape(part.name)}</td><td>{part.start}</td><td>{part.num_rows}</td></tr>"
            for index, part in parts
        )
        head = "<tr><th>shard</th><th>file</th><th>first row</th><th>rows</th></tr>"
        left = len(self.shards) - _SHARDS_SHOWN
        more = f'<tr><td colspan="4">and {left} more shards</td></tr>' if left > 0 else ""
        return f"<table><caption>{escape(repr(self))}</caption>{head}{rows}{more}</table>"

    @property
    def num_prompts(self) -> int:
        """The number of rows of all shards."""
        return self.shards.num_rows

    def to_parquet(self) -> bytes:
        """Return the plan as a Parquet file; the same plan gives the same bytes."""
        metadata = {
            "flux_batch": json.dumps({"version": self.rules, "num_prompts": self.num_prompts}),
            **({"lists": self.lists} if self.lists else {}),
            "files": json.dumps([[file.name, file.size, file.version] for file in self.files]),
            "passthrough": base64.b64encode(self.passthrough.serialize().to_pybytes()),
        }
        buffer = io.BytesIO()
        table = pa.Table.from_batches([self.shards.parts]).replace_schema_metadata(metadata)
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes, files: Sequence[PromptFile], *, new_files: bool = False) -> Plan:
        """Read a plan and bind it to the current files of the data set.

        Raises: PlanMismatch if a file was removed or changed since, or added without `new_files`; ValueError if `data`
        is not a plan.
        """
        rules = rules_of_plan(data)
        try:
            table = _opened(data).read(use_threads=False)
        except _DAMAGED as error:
            raise _not_a_plan(error) from error
        metadata = table.schema.metadata
        planned = {name: (size, version) for name, size, version in json.loads(metadata[b"files"])}
        found = {file.name: file for file in files}
        _check_same_files(planned, found, new_files)
        shards = Shards.from_columns(table, {name: found[name].uri for name in planned})
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(metadata[b"passthrough"])))
        lists = metadata.get(b"lists", b"").decode()
        return cls(shards, tuple(found[name] for name in planned), schema, rules, lists)


def rules_of_plan(data: bytes) -> int:
    """Return the rules by which the files of a saved plan were listed. Raises: ValueError if it is not a plan."""
    try:
        metadata = _opened(data).schema_arrow.metadata
        return int(json.loads(metadata[b"flux_batch"])["version"])
    except _DAMAGED as error:
        raise _not_a_plan(error) from error


def _opened(data: bytes) -> pq.ParquetFile:
    """Open a saved plan; its footer may name a million files, too long for pyarrow's default limit."""
    return pq.ParquetFile(pa.BufferReader(data), thrift_string_size_limit=max(1, len(data)))


def _not_a_plan(error: Exception) -> ValueError:
    return ValueError(f"not a plan of this program ({error})")


def _file_range(file: PromptFile, rows: RowRange) -> FileRange:
    return FileRange(
        uri=file.uri,
        name=file.name,
        start=rows.start,
        num_rows=rows.num_rows,
        offset=rows.offset,
        line=rows.line,
    )


@dataclass(frozen=True, slots=True)
class Outline:
    """The part of a saved plan that needs no data set: rows per shard, types of passthrough columns."""

    num_rows: array[int]
    passthrough: pa.Schema

    @classmethod
    def from_parquet(cls, data: bytes) -> Outline:
        """Read a saved plan without reading the data set. Raises: ValueError if it is not a plan."""
        try:
            file = _opened(data)
            passthrough = base64.b64decode(file.schema_arrow.metadata[b"passthrough"])
            num_rows, last = array("q"), -1
            for parts in file.iter_batches(_PARTS_AT_ONCE, columns=["shard", "num_rows"], use_threads=False):
                for shard, num in zip(parts["shard"].to_pylist(), parts["num_rows"].to_pylist(), strict=True):
                    if shard == last:
                        num_rows[-1] += num
                    else:
                        num_rows.append(num)
                    last = shard
            return cls(num_rows, pa.ipc.read_schema(pa.py_buffer(passthrough)))
        except _DAMAGED as error:
            raise _not_a_plan(error) from error


def make_plan(prompts: PromptsConfig, shard_size: int) -> Plan:
    """Return a plan of shards with at most `shard_size` rows; small files and ends of files share shards.

    It reads listings and Parquet footers, and streams text formats once. Raises: SourceError if there are no rows.
    """
    plan = extended(Plan(shards=Shards.none(), files=(), passthrough=pa.schema([])), prompts, shard_size)
    if not plan.shards:
        raise SourceError(f"{', '.join(prompts.uri)}: the data set has no rows")
    return plan


def extended(plan: Plan, prompts: PromptsConfig, shard_size: int) -> Plan:
    """Return a plan with the new files of the data set appended as shards; planned shards do not change.

    Returns: the same object if no file is new. Raises: SourceError; PlanMismatch if the new files do not fit.
    """
    source = PromptSource(prompts, plan.rules)
    planned = {file.name for file in plan.files}
    listing = source.listing()
    files = [file for file in listing.files if file.name not in planned]
    if not files:
        return plan
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        limit = None if prompts.limit is None else prompts.limit - plan.num_prompts
        cuts = _cut(source, files, shard_size, limit, pool)
        pieces = ((file, rows) for file, ranges in zip(files, cuts, strict=True) for rows in ranges)
        shards = plan.shards.extended(_shared(_limited(pieces, limit), shard_size))
    num_new = len(shards) - len(plan.shards)
    names = set(shards.files)
    used = [file for file in files if file.name in names]
    passthrough = plan.passthrough
    if num_new:
        # With planned files, a column without values has the null type here, which fits the type in the plan.
        found = source.passthrough_schema(used, pa.null() if plan.shards else pa.string())
        if plan.shards:
            _check_fits(plan, num_new, found)
        else:
            passthrough = found
    return Plan(
        shards,
        plan.files + tuple(files),
        passthrough,
        plan.rules,
        plan.lists if plan.shards else source.lists,
        (*skipped_notes(listing.skipped), *source.unused_columns(used)),
    )


def random_rows(plan: Plan, prompts: PromptsConfig, num_rows: int) -> Plan:
    """Return a plan of one shard with random rows of another plan, in their order."""
    numbers = sorted(SystemRandom().sample(range(plan.num_prompts), min(num_rows, plan.num_prompts)))
    ends = plan.shards.row_ends
    source = PromptSource(prompts, plan.rules)
    parts = []
    for number in numbers:
        index = bisect_right(ends, number)
        parts.append(source.one_row(plan.shards[index], number - (ends[index - 1] if index else 0)))
    return replace(plan, shards=Shards.none().extended([parts]))


def check_same_job(saved: JobConfig, config: JobConfig) -> None:
    """Raise PlanMismatch with every difference if `config` would make different images than the saved run."""
    before, now = saved.identity(), config.identity()
    changed = [f"  {key}: {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise PlanMismatch(
            f"{config.output.uri}: this output holds a run of another job; use another output.uri, or undo:\n"
            + "\n".join(changed)
        )


def check_same_lists(plan: Plan, lists: str) -> None:
    """Raise PlanMismatch if the lists of values differ from the run's; old plans have no record of them."""
    if plan.lists and plan.lists != lists:
        raise PlanMismatch(
            "a list of values in a file, of prompts.samplers or prompts.wildcards, has changed since the run was "
            "planned; use another output.uri, or put the list back"
        )


def _check_fits(plan: Plan, num_new: int, passthrough: pa.Schema) -> None:
    """Raise PlanMismatch if new shards would change names or column types of planned ones."""
    num_shards = len(plan.shards) + num_new
    if shard_name(0, num_shards) != shard_name(0, len(plan.shards)):
        raise PlanMismatch(
            f"{num_new} new shards make {num_shards} in all, but the names of the {len(plan.shards)} existing shards "
            "have too few digits for that: use another output.uri for the new files"
        )
    for column in plan.passthrough:
        new = passthrough.field(column.name).type
        if not _holds(column.type, new):
            raise PlanMismatch(
                f"the new prompts have type {new} in column {column.name!r} of prompts.passthrough, but the run has "
                f"{column.type}"
            )


def _holds(kind: pa.DataType, new: pa.DataType) -> bool:
    """Return whether a column of type `kind` can hold values of type `new`."""
    fields = [pa.schema([("", kind)]), pa.schema([("", new)])]
    try:
        return bool(pa.unify_schemas(fields, promote_options="permissive").field(0).type == kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False


def _cut(
    source: PromptSource, files: Sequence[PromptFile], shard_size: int, limit: int | None, pool: ThreadPoolExecutor
) -> Iterator[list[RowRange]]:
    """Yield the row ranges of each file, with a limit only the first ones; read a thousand files at a time."""
    at_most = None if limit is None else max(1, limit)
    for first in range(0, len(files), FILES_AT_ONCE):
        some = files[first : first + FILES_AT_ONCE]
        yield from pool.map(lambda file: source.split(file, shard_size, at_most), some)


def _limited(pieces: Iterable[tuple[PromptFile, RowRange]], limit: int | None) -> Iterator[FileRange]:
    """Yield the first `limit` rows of the pieces."""
    left = math.inf if limit is None else limit
    for file, rows in pieces:
        if left <= 0:
            return
        num_rows = int(min(rows.num_rows, left))
        yield _file_range(file, replace(rows, num_rows=num_rows))
        left -= num_rows


def _shared(parts: Iterable[FileRange], shard_size: int) -> Iterator[tuple[FileRange, ...]]:
    """Yield the parts of each shard: consecutive parts share a shard as long as all rows fit."""
    shard: list[FileRange] = []
    num_rows = 0
    for part in parts:
        if shard and num_rows + part.num_rows > shard_size:
            yield tuple(shard)
            shard, num_rows = [], 0
        shard.append(part)
        num_rows += part.num_rows
    if shard:
        yield tuple(shard)


def _check_same_files(planned: dict[str, tuple[int, str]], found: dict[str, PromptFile], new_files: bool) -> None:
    differences = [f"  {name}: is gone" for name in planned if name not in found]
    differences += [
        f"  {name}: was {size} bytes, version {version}; is {found[name].size}, {found[name].version}"
        for name, (size, version) in planned.items()
        if name in found and (found[name].size, found[name].version) != (size, version)
    ]
    added = [] if new_files else [f"  {name}: is new; --extend adds it" for name in found if name not in planned]
    lines = differences + added
    if lines:
        more = len(lines) - _FILES_SHOWN
        shown = [*lines[:_FILES_SHOWN], *([f"  ... and {count_of(more, 'other file')}"] if more > 0 else [])]
        raise PlanMismatch(
            "the prompts differ from those of the run in this output; use another output.uri, or undo:\n"
            + "\n".join(shown)
        )
