"""Shards that fail on some or on all workers, on a simulated cluster."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future

import pytest

from flux_batch.bench.scale.simulated_cluster import SimulatedCluster, SimulatedWorker, Timing
from flux_batch.engine.failure import Failure
from flux_batch.engine.ray_pool import Pool, RayPool
from flux_batch.engine.stop import Stop
from flux_batch.records import Attempt, Shard, ShardResult
from flux_batch.telemetry import EngineState
from helpers.toil import make_shards

NUM_WORKERS = 4
SHARD_S = 60.0
ERROR = Failure.of(OSError(30, "Read-only file system: '/tmp'"))


class Failing:
    """Makes every shard fail soon on some workers, and some shards fail on all workers."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        workers: Collection[int] = (),
        shards: Collection[int] = (),
        after_s: float = 0.05,
    ) -> None:
        self.num_failures = 0
        make, load = SimulatedWorker.make, SimulatedWorker.open

        def failing(one: SimulatedWorker, call: Future[object], shard: Shard, attempt: Attempt) -> None:
            if one.number in workers or shard.index in shards:
                self.num_failures += 1
                one.cluster.answer(call, after_s, ERROR)
            else:
                make(one, call, shard, attempt)

        def opened(one: SimulatedWorker, call: Future[object], after_s: float) -> None:
            if one.number in workers:
                one.cluster.answer(call, 2.5, None)  # long before the others
            else:
                load(one, call, after_s)

        monkeypatch.setattr(SimulatedWorker, "make", failing)
        monkeypatch.setattr(SimulatedWorker, "open", opened)


def results_of(num_shards: int, spread: float = 1.0) -> tuple[list[ShardResult], float]:
    """Run shards. Returns: their results, and the simulated seconds."""
    cluster = SimulatedCluster(Timing(shard_s=SHARD_S, finish_s=0.1, open_s=120.0, spread=spread))
    options = RayPool(NUM_WORKERS, max_attempts=3)
    pool = Pool(options, cluster, make_shards(num_shards), Stop(), EngineState(), lambda **gauges: None)
    results = list(pool.results())
    assert sorted(result.shard for result in results) == list(range(num_shards))
    pool.end()
    return results, cluster.clock()


@pytest.mark.parametrize("broken", [{0}, {0, 1, 2}])
def test_a_worker_on_which_all_shards_fail_costs_no_shard(monkeypatch: pytest.MonkeyPatch, broken: set[int]) -> None:
    failing = Failing(monkeypatch, workers=broken)
    results, seconds = results_of(200)
    assert [result.error for result in results] == [None] * 200
    assert failing.num_failures < len(broken) * seconds / 10  # pauses grow up to a minute


def test_shards_that_fail_on_all_workers_end_the_run_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, shards=range(200))
    results, seconds = results_of(200)
    assert all(result.error == "OSError: [Errno 30] Read-only file system: '/tmp' (attempt 3)" for result in results)
    assert failing.num_failures < 200 * 3 + 100
    assert seconds < 200


def test_shards_that_fail_everywhere_are_given_up_and_the_others_made(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = set(range(0, 200, 10))
    Failing(monkeypatch, shards=bad)
    results, _ = results_of(200)
    assert {result.shard for result in results if result.error} == bad


@pytest.mark.timeout(60)
def test_workers_that_load_for_ever_keep_no_shard_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {5, 6, 7}
    Failing(monkeypatch, shards=bad)
    load = SimulatedWorker.open

    def hanging(one: SimulatedWorker, call: Future[object], after_s: float) -> None:
        if not one.number:
            load(one, call, after_s)

    monkeypatch.setattr(SimulatedWorker, "open", hanging)
    results, seconds = results_of(20)
    assert [result.shard for result in results[:17]] == [shard for shard in range(20) if shard not in bad]
    assert {result.shard for result in results if result.error} == bad
    assert seconds < 120 + 20 * SHARD_S + 120


@pytest.mark.parametrize("num_shards", range(10, 40, 3))
def test_the_worker_that_stays_for_the_last_shard_is_not_one_on_which_all_fail(
    monkeypatch: pytest.MonkeyPatch, num_shards: int
) -> None:
    Failing(monkeypatch, workers={1, 2}, after_s=30.0)
    results, _ = results_of(num_shards, spread=4.0)
    assert [result.error for result in results] == [None] * num_shards
