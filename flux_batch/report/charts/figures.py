"""The figures of a run, read from its output alone: commits, a sample of metadata and annotations, the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flux_batch.output.paths import REPORT, SUCCESS, metadata_file
from flux_batch.records import Commit
from flux_batch.report.gallery.rows import (
    Row,
    annotators,
    read_annotations,
    read_failed_rows,
    read_table,
    spread,
)
from flux_batch.report.gallery.rows import ShardCounts as FailedCounts
from flux_batch.report.saved_run import SavedRun, read_json
from flux_batch.storage.store import Store

_READERS = 8
# The number of shards whose metadata is read, evenly spread over the run: enough for shares, not for sums.
_MAX_SHARDS_READ = 400
_MAX_FAILED = 100
# Numeric columns of the metadata that are not measurements.
_NO_MEASURE = {"seed", "image_index", "width", "height", "num_inference_steps", "step_cache"}


@dataclass(frozen=True, slots=True)
class ShardTime:
    """The work on a committed shard: worker, times (unix, 0 if not recorded) and attempt."""

    shard: int
    worker: str
    num_images: int
    num_failed: int
    started: float
    finished: float
    attempt: int
    num_lost: int


@dataclass(kw_only=True, slots=True)
class Figures:
    """The figures of a run; `sizes`, `steps` and `measures` cover only `num_rows_read` rows."""

    name: str
    num_shards: int
    is_complete: bool
    report: dict[str, Any]
    shards: list[ShardTime] = field(default_factory=list)
    stage_s: Counter[str] = field(default_factory=Counter)
    device_s: float = 0.0
    num_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    failed: list[Row] = field(default_factory=list)
    num_rows_read: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    measures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """The number of successful images."""
        return sum(each.num_images - each.num_failed for each in self.shards)

    def add(self, commit: Commit) -> None:
        """Add the figures of a commit. The commit is not kept, since it may name hundreds of files."""
        self.shards.append(
            ShardTime(
                commit.shard,
                commit.worker,
                commit.num_images,
                commit.num_failed,
                commit.started_unix_time,
                max(commit.started_unix_time, commit.finished_unix_time),  # a clock may have been set back
                commit.attempt,
                commit.num_lost,
            )
        )
        self.stage_s.update(commit.stage_s)
        self.device_s += commit.device_s
        self.num_bytes += sum(file.bytes for file in commit.files)
        self.failures.update(commit.failures)

    def add_row(self, row: Row) -> None:
        """Add the figures of an image from its row."""
        self.num_rows_read += 1
        self.sizes[f"{row.get('width')} x {row.get('height')}"] += 1
        self.steps[str(row.get("num_inference_steps"))] += 1
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and math.isfinite(value) and name not in _NO_MEASURE:
                self.measures.setdefault(name, []).append(float(value))


def read_figures(store: Store) -> Figures:
    """Read the figures of a run. Raises: JobError if there is no run, StoreError."""
    run = SavedRun.open(store)
    done = sorted(run.commits.done())
    figures = Figures(
        name=run.config.name,
        num_shards=run.num_shards,
        is_complete=store.exists(SUCCESS),
        report=read_json(store, REPORT) or {},
    )
    for commit in run.commits.read_all(done):
        figures.add(commit)
    for row in _sampled_rows(run, [done[number] for number in spread(len(done), _MAX_SHARDS_READ)]):
        if row.get("status") == "success":
            figures.add_row(row)
    counts = [FailedCounts(each.shard, each.num_images, each.num_failed) for each in figures.shards]
    figures.failed = read_failed_rows(run.commits, counts, _MAX_FAILED)
    return figures


def _sampled_rows(run: SavedRun, shards: list[int]) -> Iterator[Row]:
    """Yield the rows of some shards with their annotations."""
    names = annotators(run.commits)

    def read(shard: int) -> list[Row]:
        rows, _ = read_table(run.commits, metadata_file(run.name(shard)))
        said = read_annotations(run.commits, names, shard)
        return [{**row, **said.get(row["key"], {})} for row in rows]

    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(shards), _READERS):
            for rows in pool.map(read, shards[first : first + _READERS]):
                yield from rows
