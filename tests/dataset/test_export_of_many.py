"""Exports of runs with many shards and images: their requests to the store, and their memory."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flux_batch.dataset.export.export import export
from flux_batch.dataset.export.facts import run_facts
from flux_batch.dataset.export.source import ExportSource
from flux_batch.errors import JobError
from flux_batch.output.commits import Commits
from flux_batch.storage.store import Store
from helpers.finished_runs import finish, make_run
from helpers.job_files import make_job

SOURCE = "flux_batch.dataset.export.source"
NUM_SHARDS, ROWS_A_SHARD = 1000, 100


def test_the_counts_of_a_run_are_those_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ExportSource.open(Store(make_run(tmp_path, "webdataset").output.uri))
    read: list[int] = []
    monkeypatch.setattr(Commits, "read", lambda self, shard: read.append(shard))

    facts = run_facts(source)

    assert (facts.num_images, facts.num_failed, facts.failures) == (12, 1, {"RuntimeError": 1})
    assert read == []  # a million shards would take a million requests for each export


def keys_of(shard: int) -> list[str]:
    return [f"{shard:05d}{row:04d}" for row in range(ROWS_A_SHARD)]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportSource:
    """A run of 100,000 images, and a selection of the first of each shard and a thousand more."""
    source = ExportSource.open(Store(make_run(tmp_path, "webdataset").output.uri), selection="some")
    chosen = [*keys_of(7), *(keys_of(shard)[0] for shard in range(NUM_SHARDS) if shard != 7)]
    splits = ["test" if number % 2 else "train" for number in range(len(chosen))]

    def tables(run: Any, shards: list[int], *_: Any) -> Iterator[pa.Table]:
        for shard in shards:
            sha256, status = ["a" * 64] * ROWS_A_SHARD, ["success"] * ROWS_A_SHARD
            yield pa.table({"key": keys_of(shard), "sha256": sha256, "status": status})

    monkeypatch.setattr(f"{SOURCE}.committed_shards", lambda run: list(range(NUM_SHARDS)))
    monkeypatch.setattr(f"{SOURCE}.read_tables", tables)
    monkeypatch.setattr(f"{SOURCE}.read_selection", lambda *_: pa.table({"key": chosen, "split": splits}))
    return source


def test_keys_are_no_objects_before_they_are_needed(large: ExportSource) -> None:
    tracemalloc.start()
    try:
        num_images = large.chosen.num_rows
        pieces = large.pieces(100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert num_images == sum(piece.num_images for piece in pieces) == NUM_SHARDS + ROWS_A_SHARD - 1
    assert list(large.splits) == ["train", "test"]
    assert [list(piece.hashes[7]) for piece in pieces if 7 in piece.hashes] == [keys_of(7)[::2], keys_of(7)[1::2]]
    assert peak < 20 * NUM_SHARDS * ROWS_A_SHARD  # bytes; a key alone takes 60


def test_a_selection_of_images_that_the_run_has_not_is_refused(
    large: ExportSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"key": ["000000000", "b", "a"], "split": ["train"] * 3})
    monkeypatch.setattr(f"{SOURCE}.read_selection", lambda *_: table)
    with pytest.raises(JobError, match="has 2 images that the run has not, as a; select again"):
        large.chosen  # noqa: B018


def test_the_commits_of_an_export_are_read_several_at_a_time(tmp_path: Path) -> None:
    at_once = threading.Barrier(4, timeout=20)

    class Waiting(Store):
        """A store that answers reads of commits only once four are requested."""

        def read(self, key: str) -> bytes:
            if "/commits/" in key:
                at_once.wait()
            return super().read(key)

    config = make_job(tmp_path, [{"prompt": str(number)} for number in range(8)])
    finish(config)
    assert export(Store(config.output.uri), Waiting(str(tmp_path / "dest")), shard_size=1).num_shards == 8


def test_a_folder_of_an_export_is_listed_once(tmp_path: Path) -> None:
    listed: list[str] = []

    class Listing(Store):
        def children(self, folder: str) -> dict[str, int | None]:
            listed.append(folder)
            return super().children(folder)

    config = make_job(tmp_path, [{"prompt": str(number)} for number in range(8)])
    finish(config)
    for format in ("webdataset", "files"):
        export(Store(config.output.uri), Listing(str(tmp_path / format)), format=format, shard_size=2)

    assert sorted(listed) == ["_export/commits"] * 2 + ["train", *(f"train/0000{number}" for number in range(4))]
