"""The queue of batches to the staging area: their order, their number in flight, and polls between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from flux_batch.errors import StoreError
from flux_batch.records import Commit
from flux_batch.telemetry import Metrics
from flux_batch.worker.staging_queue import StagingQueue
from helpers.waiting import PATIENCE_S

COMMIT = Commit(shard=0, worker="elsewhere:1", num_images=2, num_failed=0, files=())


class Run:
    """A shard whose images are names; staging waits until it is allowed."""

    index = 0

    def __init__(self) -> None:
        self.may_stage = threading.Event()
        self.may_stage.set()
        self.done: list[str] = []
        self.is_intact = True

    def encode(self, outcome: str) -> str:
        return outcome.upper()

    def stage(self, images: Sequence[Future[str]]) -> None:
        assert self.may_stage.wait(PATIENCE_S)
        names = "".join(image.result() for image in images)
        if "!" in names:
            raise StoreError("no answer")
        self.done.append(names)

    def adopt_others(self) -> bool:
        self.done.append("poll")
        return self.is_intact


class Commits:
    def find(self, shard: int) -> Commit | None:
        return COMMIT


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def queue(run: Run) -> Iterator[StagingQueue]:
    run_of_names: Any = run
    commits: Any = Commits()
    with StagingQueue(run_of_names, commits, 2, Metrics("cats"), lambda: run.done.append("progress")) as queue:
        yield queue


def put(queue: StagingQueue, *batches: str) -> None:
    for batch in batches:
        names: Any = list(batch)
        queue.put(names)


def test_batches_are_staged_whole_and_in_order(queue: StagingQueue, run: Run) -> None:
    put(queue, "ab", "c", "def")
    queue.wait()
    assert run.done == ["AB", "progress", "C", "progress", "DEF", "progress"]


def test_waiting_leaves_as_many_batches_in_flight_as_it_may(queue: StagingQueue, run: Run) -> None:
    run.may_stage.clear()
    put(queue, "a")
    queue.wait(1)  # ends although the batch is not staged
    assert run.done == []
    run.may_stage.set()
    put(queue, "b")
    queue.wait(1)
    assert run.done[0] == "A"


def test_an_error_of_staging_is_raised_where_it_is_waited_for_and_not_where_it_is_drained(queue: StagingQueue) -> None:
    put(queue, "!")
    queue.drain()
    with pytest.raises(StoreError, match="no answer"):
        queue.wait()


def test_a_poll_comes_after_the_batches_before_it(queue: StagingQueue, run: Run) -> None:
    put(queue, "a")
    queue.poll()
    put(queue, "b")
    assert queue.polled_commit() is None
    queue.wait()
    assert [name for name in run.done if name != "progress"] == ["A", "poll", "B"]


def test_a_commit_is_looked_for_once_staged_images_are_gone(queue: StagingQueue, run: Run) -> None:
    assert queue.polled_commit() is None
    run.is_intact = False
    queue.poll()
    assert queue.polled_commit() == COMMIT


def test_the_shard_of_a_single_batch_settles_without_a_poll(queue: StagingQueue, run: Run) -> None:
    run.is_intact = False
    put(queue, "a")
    assert queue.settle() is None
    assert "poll" not in run.done

    put(queue, "b")
    assert queue.settle() == COMMIT
    assert run.done.count("poll") == 1
