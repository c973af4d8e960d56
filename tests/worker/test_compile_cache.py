"""The compile cache that workers share; a run also works without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import StoreError
from flux_batch.job import run
from flux_batch.output.gc import find_leftovers
from flux_batch.output.paths import RunFolder
from flux_batch.storage.store import Store
from flux_batch.worker.compile_cache import SharedCompileCache
from helpers.fakes import FakePipeline
from helpers.job_files import data_files, make_job

KEY = "_run/compile_cache/torch-cpu"


class Cache:
    """A compile cache that has `data`, or loads given data."""

    name = "torch-cpu"

    def __init__(self, data: bytes | None = None) -> None:
        self.data = data
        self.num_saved = 0

    def save(self) -> bytes | None:
        self.num_saved += 1
        return self.data

    def load(self, data: bytes) -> None:
        if data == b"damaged":
            raise ValueError("not a cache written by torch.compile")
        self.data = data


def test_the_first_worker_writes_and_the_next_reads(tmp_path: Path) -> None:
    store, first, second = Store(str(tmp_path)), Cache(b"blocks"), Cache()
    shared = SharedCompileCache(store, first)
    assert not (tmp_path / KEY).exists()
    shared.share()
    shared.share()
    assert first.num_saved == 1
    assert store.read(KEY) == b"blocks"

    taken = SharedCompileCache(store, second)
    assert second.data == b"blocks"
    taken.share()
    assert second.num_saved == 0


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    one, other = (SharedCompileCache(store, Cache(data)) for data in (b"one", b"other"))
    one.share()
    other.share()
    assert store.read(KEY) == b"one"


def test_nothing_is_written_if_nothing_was_compiled(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for cache in (None, Cache(None)):
        SharedCompileCache(store, cache).share()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_reported_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, cache = Store(str(tmp_path)), Cache(b"own")
    store.write(KEY, b"damaged")
    SharedCompileCache(store, cache).share()
    assert cache.data == b"own"
    assert store.read(KEY) == b"damaged"
    assert "torch-cpu: not used, blocks are compiled again: not a cache" in caplog.text


def test_an_unavailable_storage_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> Any:
        raise StoreError("away")

    store = Store(str(tmp_path))
    for operation in ("read", "exists", "put_if_absent"):
        monkeypatch.setattr(store, operation, away)
    SharedCompileCache(store, Cache(b"blocks")).share()
    assert "compiled again: away" in caplog.text
    assert "not shared: away" in caplog.text


def test_a_run_writes_its_cache_once_and_knows_it_as_its_own_file(tmp_path: Path) -> None:
    caches: list[Cache] = []

    def compiling(model: ModelConfig) -> FakePipeline:
        caches.append(Cache(b"blocks" if not caches else None))
        pipeline = FakePipeline()
        pipeline.compile_cache = caches[-1]
        return pipeline

    config = make_job(tmp_path)
    assert run(config, engine=LocalEngine(), make_pipeline=compiling).is_complete
    store = Store(config.output.uri)
    assert store.read(KEY) == b"blocks"
    assert caches[0].num_saved == 1
    assert not list(find_leftovers(RunFolder(store, 3)))

    before = data_files(tmp_path / "out")
    assert run(config, engine=LocalEngine(), make_pipeline=compiling).is_complete
    assert data_files(tmp_path / "out") == before
