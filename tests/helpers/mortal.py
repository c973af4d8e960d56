"""Workers that die like a killed process: nothing of them reaches the store any more, and no cleanup runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

import flux_batch.worker.worker
from flux_batch.config.schema import JobConfig
from flux_batch.dataset.annotators.score import load_scorer
from flux_batch.output.metadata import columns_of_job
from flux_batch.plan.plan import Plan, make_plan
from flux_batch.records import Attempt, ShardResult
from flux_batch.storage.store import Store
from flux_batch.worker.worker import Worker, WorkerFactory
from helpers.fakes import FakePipeline, make_fake_pipeline
from helpers.job_files import make_job
from helpers.waiting import PATIENCE_S

PROMPTS = [f"image {number}" for number in range(8)]
T = TypeVar("T")


class Death(BaseException):
    """The end of a worker, for the test; the worker's own code cannot handle it."""


class Life:
    """The life of a worker, which ends before write or delete number `last`, or at `end`."""

    def __init__(self, last: int | None = None) -> None:
        self.is_over = False
        self.writes: list[str] = []
        self.has_written = threading.Condition()
        self._last = last

    def end(self) -> None:
        self.is_over = True
        raise Death

    def spend(self, key: str) -> None:
        with self.has_written:
            self.check()
            if len(self.writes) == self._last:
                self.is_over = True
                self.has_written.notify_all()
                raise Death
            self.writes.append(key)

    def check(self) -> None:
        if self.is_over:
            raise Death


class MortalStore(Store):
    """A store that refuses all requests of a dead worker."""

    life = Life()

    def _call(self, key: str, operation: str, function: Callable[[], T]) -> T:
        if operation in ("write", "create", "delete"):
            self.life.spend(key)
        self.life.check()
        result = super()._call(key, operation, function)
        with self.life.has_written:
            self.life.has_written.notify_all()
        return result


class MortalPipeline(FakePipeline):
    """A fake pipeline that counts its finished images; a prompt with `[die]` ends its life.

    It is slower than the store: it finishes no batch before the previous one is stored.
    """

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.made: list[str] = []
        self._life = life
        self._begun: list[set[str]] = []  # batches

    def __call__(self, prompt: Any, **others: Any) -> Any:
        if not (self._begun and self._begun[-1] >= set(prompt)):  # else it is a part of a batch that failed
            self._begun.append(set(prompt))
        images = super().__call__([text.replace("[die]", "") for text in prompt], **others)
        with self._life.has_written:
            assert self._life.has_written.wait_for(self._is_last_stored, PATIENCE_S)
        if any("[die]" in text for text in prompt):
            self._life.end()
        self._life.check()
        self.made += prompt
        return images

    def _is_last_stored(self) -> bool:
        return self._life.is_over or self._num_staged() >= len(self._begun) - 1

    def _num_staged(self) -> int:
        return sum("staging" in key and key.endswith(".parquet") for key in self._life.writes)


def open_worker(
    config: JobConfig,
    monkeypatch: pytest.MonkeyPatch,
    life: Life | None = None,
    pipeline: FakePipeline | None = None,
    **options: bool,
) -> tuple[Worker, Any, Plan]:
    """Open a worker as in its own process; it never dies without `life`. options: of its factory."""
    life = life or Life()
    plan = make_plan(config.prompts, config.output.shard_size)
    store = type("ItsStore", (MortalStore,), {"life": life})
    monkeypatch.setattr(flux_batch.worker.worker, "Store", store)
    pipeline = pipeline or MortalPipeline(life)
    columns = columns_of_job(plan.passthrough, config)
    factory = WorkerFactory(config, len(plan.shards), columns, make_fake_pipeline, make_scorer=load_scorer, **options)
    worker = Worker(factory, pipeline)
    return worker, pipeline, plan


def staged(config: JobConfig) -> list[Path]:
    """List the files in the staging area of a run on this disk."""
    return sorted(path for path in Path(config.output.uri, "_run/staging").rglob("*") if path.is_file())


def one_shard_job(folder: Path, prompts: list[str] | None = None, batch_size: int = 2, **sections: Any) -> JobConfig:
    """Make a job of one shard."""
    rows = [{"prompt": prompt} for prompt in prompts or PROMPTS]
    return make_job(folder, rows, output={"shard_size": 20}, workers={"batch_size": batch_size}, **sections)


def run_shard(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch, attempt: Attempt | None = None, **options: bool
) -> tuple[ShardResult, Any]:
    worker, pipeline, plan = open_worker(config, monkeypatch, **options)
    return worker.make(plan.shards[0], attempt or Attempt()).finish(), pipeline
