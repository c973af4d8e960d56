"""The selection of images, in steps, and their splits.

The steps: keys, an expression, near-duplicates, the best by a column, a fixed number. Each works on the images that the
previous one left. The same run and criteria give the same selection, since order and random choice depend only on keys
and ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flux_batch.dataset.select.keys import read_keys
from flux_batch.dataset.select.near import near_embeddings, near_hashes
from flux_batch.dataset.select.selection import check_name, write_selection
from flux_batch.dataset.select.tables import Tables
from flux_batch.errors import JobError, count_of
from flux_batch.output.paths import METADATA, TRAIN
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store

# In bits of 64, as in imagededup's PHash (idealo/imagededup, methods/hashing.py: max_distance_threshold).
_HASH_DISTANCE = 10
# 1 - cosine.
_EMBEDDING_DISTANCE = 0.05
# Shares of splits are computed in whole parts of this number.
_PARTS = 1_000_000
_SHOWN_KEYS = 3


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """The criteria of a selection. Expressions are DuckDB's, over columns of the metadata and the annotations."""

    where: str | None = None
    keys: str | None = None  # the address of a list of keys
    dedup: str | None = None  # phash, or a column of hashes or embeddings
    distance: float | None = None
    by: str | None = None  # greater is better
    within: str | None = None
    top: int | None = None
    take: int | None = None
    split: Mapping[str, float] = field(default_factory=lambda: {TRAIN: 1.0})
    stratify: str | None = None

    def expressions(self) -> list[str]:
        """Return the expressions of the criteria."""
        return [text for text in (self.where, self.dedup, self.by, self.within, self.stratify) if text is not None]


@dataclass(frozen=True)
class Selected:
    """The outcome of `select`: counts for people and programs."""

    name: str
    uri: str
    is_new: bool
    num_rows: int
    left_out: Mapping[str, int]  # reason -> number of images, in the order of the steps
    splits: Mapping[str, int]
    num_shards: int
    num_planned: int

    @property
    def num_chosen(self) -> int:
        """The number of chosen images."""
        return sum(self.splits.values())


def select(store: Store, name: str, criteria: Criteria, *, replace: bool = False) -> Selected:
    """Choose images of a run and write them as a selection.

    Raises: JobError for criteria that cannot be met, or if another selection has that name; StoreError.

    >>> chosen = select(Store("out/done"), "half", Criteria(where="width = 16", take=5))
    >>> chosen.num_rows, dict(chosen.splits)
    (10, {'train': 5})
    """
    check_name(name)
    _check(criteria)
    run = SavedRun.open(store)
    keys = read_keys(criteria.keys) if criteria.keys is not None else None
    tables = Tables(run, criteria.expressions())
    with closing(tables.connection):
        chooser = _Chooser(tables, criteria)
        left_out = chooser.choose(keys)
        table = chooser.result()
    counts = {each["values"]: each["counts"] for each in table["split"].value_counts().to_pylist()}
    splits = {split: counts.get(split, 0) for split in criteria.split}
    origin = {"criteria": asdict(criteria), "left_out": left_out, "splits": splits, "num_rows": chooser.num_rows}
    is_new = write_selection(store, name, table, origin, replace=replace)
    return Selected(name, store.uri, is_new, chooser.num_rows, left_out, splits, tables.num_shards, run.num_shards)


def format_selected(selected: Selected) -> str:
    """Return a table with the numbers of chosen images and of left-out images by reason."""
    shown = [("images of the run", selected.num_rows)]
    shown += [(f"- {why}", number) for why, number in selected.left_out.items()]
    shown += [("= chosen", selected.num_chosen)]
    if [*selected.splits] != [TRAIN]:
        shown += [(f"  {split}", number) for split, number in selected.splits.items()]
    width = max(len(text) for text, _ in shown)
    return "\n".join(f"{text:<{width}}  {number:>10,}" for text, number in shown)


def _check(criteria: Criteria) -> None:
    """Raise JobError for criteria that contradict each other."""
    for name, number in (("--top", criteria.top), ("--take", criteria.take)):
        if number is not None and number < 1:
            raise JobError(f"{name} {number}: must be 1 or more")
    if criteria.top is not None and criteria.by is None:
        raise JobError("--top needs --by COLUMN, by which images are compared")
    if criteria.within is not None and criteria.top is None:
        raise JobError("--within needs --top: the best so many of each group")
    if criteria.by is not None and criteria.top is None and criteria.dedup is None:
        raise JobError("--by needs --top or --dedup, which keep the best")
    if criteria.distance is not None and (criteria.dedup is None or criteria.distance < 0):
        raise JobError("--distance must be 0 or more, and needs --dedup")
    if any(share <= 0 for share in criteria.split.values()) or abs(sum(criteria.split.values()) - 1) > 1e-6:
        raise JobError("--split: shares must be above 0 and add up to 1, as in train=0.9,test=0.1")


class _Chooser:
    """The steps of a selection over the table `chosen`: ordinal, key, id, rank, instead_of."""

    def __init__(self, tables: Tables, criteria: Criteria) -> None:
        self.tables = tables
        self._criteria = criteria
        self._left_out: dict[str, int] = {}
        ((self.num_rows,),) = tables.rows(f"SELECT count(*) FROM {METADATA}")

    def choose(self, keys: Sequence[str] | None) -> dict[str, int]:
        """Run the steps. Returns: reason -> number of images that were left out."""
        self.tables.rows(
            "CREATE TABLE chosen AS SELECT ordinal, key, id, 0::BIGINT AS rank, '' AS best_of, 0::BIGINT AS instead_of "
            f"FROM {METADATA} WHERE status = 'success'"
        )
        self._count("failed to be made", self.num_rows - self._num_chosen())
        if keys is not None:
            self._keep_listed(keys)
        if self._criteria.where is not None:
            self._keep_where(self._criteria.where)
        if self._criteria.dedup is not None:
            self._drop_near(self._criteria.dedup)
        if self._criteria.top is not None:
            self._keep_top(self._criteria.top)
        if self._criteria.take is not None:
            self._take(self._criteria.take)
        if not self._num_chosen():
            raise JobError(f"no image is left: {self._said()}")
        return self._left_out

    def result(self) -> pa.Table:
        """Return the chosen images with their splits and reasons, in order."""
        self._split()
        given = [self._criteria.where or "", f"listed in {self._criteria.keys}" if self._criteria.keys else ""]
        query = f"""
            SELECT key, split, concat_ws('; ', {_text("; ".join(filter(None, given)))},
                CASE WHEN instead_of > 0 THEN 'best of ' || (instead_of + 1) || ' near-duplicates' END,
                CASE WHEN rank > 0 THEN 'rank ' || rank || {_text(f" by {self._criteria.by}")} || best_of END,
                {_text(f"one of {self._criteria.take} taken" if self._criteria.take else "")}
            ) AS reason FROM chosen JOIN splits USING (ordinal) ORDER BY ordinal
        """
        return self.tables.connection.sql(query).to_arrow_table()

    def _num_chosen(self) -> int:
        ((number,),) = self.tables.rows("SELECT count(*) FROM chosen")
        return int(number)

    def _count(self, why: str, number: int) -> None:
        if number:
            self._left_out[why] = self._left_out.get(why, 0) + number

    def _said(self, without: str = "none") -> str:
        """Return why images were left out, or that the run has `none` or `no more`."""
        return ", ".join(f"{number:,} {why}" for why, number in self._left_out.items()) or f"the run has {without}"

    def _keep(self, why: str, query: str) -> None:
        """Keep the ordinals of a query and count the others."""
        before = self._num_chosen()
        self.tables.rows(f"CREATE OR REPLACE TABLE chosen AS SELECT * FROM chosen SEMI JOIN ({query}) USING (ordinal)")
        self._count(why, before - self._num_chosen())

    def _keep_listed(self, keys: Sequence[str]) -> None:
        self.tables.connection.register("listed", pa.table({"key": pa.array(keys, pa.string())}))
        unknown = self.tables.rows(f"SELECT key FROM listed ANTI JOIN {METADATA} USING (key) ORDER BY key")
        if unknown:
            shown = ", ".join(repr(key) for (key,) in unknown[:_SHOWN_KEYS])
            raise JobError(f"{self._criteria.keys}: {count_of(len(unknown), 'key')} not of this run: {shown}")
        self._keep("not listed by --keys", "SELECT ordinal FROM chosen SEMI JOIN listed USING (key)")
        self.tables.connection.unregister("listed")

    def _keep_where(self, where: str) -> None:
        if (kind := self.tables.type_of(where)) != "BOOLEAN":
            raise JobError(f"--where {where!r}: is a {kind}; it must be true or false, as in clip > 0.27")
        self.tables.rows(f"CREATE TABLE answers AS {self.tables.values(value=where)}")
        self._keep("without a value for --where", "SELECT ordinal FROM answers WHERE value IS NOT NULL")
        self._keep("not as --where says", "SELECT ordinal FROM answers WHERE value")
        self.tables.rows("DROP TABLE answers")

    def _rank(self, **expressions: str) -> None:
        """Create the table `ranked`: the score by `--by` and the expressions of each image."""
        by = self._criteria.by or "NULL"
        self.tables.rows(f"CREATE OR REPLACE TABLE ranked AS {self.tables.values(score=by, **expressions)}")
        if self._criteria.by and self.tables.type_of(by) in ("FLOAT", "DOUBLE"):
            self.tables.rows("UPDATE ranked SET score = NULL WHERE isnan(score)")

    def _drop_near(self, dedup: str) -> None:
        self._rank(value=dedup)
        self._keep(f"without a value for --dedup {dedup}", "SELECT ordinal FROM ranked WHERE value IS NOT NULL")
        query = "SELECT ordinal, value FROM ranked WHERE value IS NOT NULL ORDER BY score DESC NULLS LAST, ordinal"
        values = self.tables.connection.sql(query).to_arrow_table().combine_chunks()
        instead = _near(dedup, values["value"], self._criteria.distance)
        ordinals = values["ordinal"].to_numpy()
        stays, num_of_group = np.unique(instead, return_counts=True)
        table = pa.table({"ordinal": ordinals[stays], "others": num_of_group - 1})
        self.tables.connection.register("stays", table)
        self._keep(f"near-duplicates by {dedup}", "SELECT ordinal FROM stays")
        self.tables.rows(
            "CREATE OR REPLACE TABLE chosen AS SELECT chosen.* REPLACE (others AS instead_of) "
            "FROM chosen JOIN stays USING (ordinal)"
        )
        self.tables.connection.unregister("stays")

    def _keep_top(self, top: int) -> None:
        self._rank(place=self._criteria.within or "''")
        self._keep("without a value for --by", "SELECT ordinal FROM ranked WHERE score IS NOT NULL")
        self.tables.rows(
            "CREATE OR REPLACE TABLE places AS SELECT ordinal, place, row_number() OVER "
            "(PARTITION BY place ORDER BY score DESC, ordinal) AS number FROM ranked WHERE score IS NOT NULL"
        )
        of_each = f" of each {self._criteria.within}" if self._criteria.within else ""
        self._keep(f"below the top {top:,}{of_each}", f"SELECT ordinal FROM places WHERE number <= {top}")
        group = "' in ' || coalesce(place::VARCHAR, 'NULL')" if self._criteria.within else "''"
        self.tables.rows(
            f"CREATE OR REPLACE TABLE chosen AS SELECT chosen.* REPLACE (number AS rank, {group} AS best_of) "
            "FROM chosen JOIN places USING (ordinal)"
        )

    def _take(self, take: int) -> None:
        """Keep exactly `take` images, drawn by the hash of their keys."""
        if (left := self._num_chosen()) < take:
            there = f"{count_of(left, 'image')} left, {take - left:,} too few"
            raise JobError(f"--take {take}: {there}: {self._said('no more')}")
        self._keep(
            f"more than --take {take:,}", f"SELECT ordinal FROM chosen ORDER BY md5('take' || key), key LIMIT {take}"
        )

    def _split(self) -> None:
        """Create the table `splits`: images of the same prompt row get the same split."""
        number = f"md5_number_lower('split' || id) % {_PARTS}"
        numbered = f"SELECT ordinal, {number} AS number FROM chosen"
        if self._criteria.stratify is not None:
            self._stratify(self._criteria.stratify)
            numbered = "SELECT ordinal, number FROM chosen JOIN strata USING (id)"
        cases, end = "", 0.0
        for name, share in self._criteria.split.items():
            end += share
            cases += f" WHEN number < {round(end * _PARTS)} THEN {_text(name)}"
        last = _text([*self._criteria.split][-1])
        self.tables.rows(
            f"CREATE TABLE splits AS SELECT ordinal, CASE{cases} ELSE {last} END AS split FROM ({numbered})"
        )

    def _stratify(self, stratify: str) -> None:
        """Create the table `strata`: the position of each id in the group of its first image, in parts of `_PARTS`."""
        self.tables.rows(f"CREATE TABLE groups AS {self.tables.values(stratum=stratify)}")
        first = "SELECT id, min(ordinal) AS ordinal, count(*) AS num FROM chosen GROUP BY id"
        # The middle of an id's images among those of its group, so that shares are exact to one row.
        before = "sum(num) OVER (PARTITION BY stratum ORDER BY md5('split' || id))::BIGINT - num"
        self.tables.rows(
            f"CREATE TABLE strata AS SELECT id, ((2 * ({before}) + 1) * {_PARTS}) "
            "// (2 * sum(num) OVER (PARTITION BY stratum)::BIGINT) AS number "
            f"FROM ({first}) JOIN groups USING (ordinal)"
        )
        self.tables.rows("DROP TABLE groups")


def _near(dedup: str, values: pa.ChunkedArray, distance: float | None) -> NDArray[Any]:
    """Find near-duplicates in a column of hashes (64 bits) or embeddings, the best first."""
    kind = values.type
    if pa.types.is_integer(kind):
        hashes = values.to_numpy().astype(np.uint64)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        hashes = np.array([_bits(dedup, value) for value in values.to_pylist()], np.uint64)
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        limit = _EMBEDDING_DISTANCE if distance is None else distance
        return near_embeddings(_matrix(dedup, values), limit)
    else:
        raise JobError(f"--dedup {dedup}: is a column of {kind}; it must hold hashes of 64 bits, or embeddings")
    return near_hashes(hashes, int(_HASH_DISTANCE if distance is None else distance))


def _bits(dedup: str, value: str | bytes) -> int:
    """Return a hash of 64 bits, written as 16 hex digits or 8 bytes."""
    if isinstance(value, bytes) and len(value) == 8:
        return int.from_bytes(value)
    try:
        if len(value) == 16:
            return int(value, 16)
    except ValueError:
        pass
    raise JobError(f"--dedup {dedup}: {value!r} is no hash of 64 bits: 16 hex digits, 8 bytes, or an integer")


def _matrix(dedup: str, values: pa.ChunkedArray) -> NDArray[Any]:
    lengths = {len(each) for each in values}
    if len(lengths) > 1:
        raise JobError(f"--dedup {dedup}: has embeddings of {min(lengths)} and of {max(lengths)} numbers")
    flat = values.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(values), -1)


def _text(text: str) -> str:
    """Return a text as a literal of SQL; an empty text as NULL, which concat_ws skips."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'" if text else "NULL"
