from collections import Counter

import pytest

from flux_batch.bench.scale.driver import bench_driver, format_driver
from flux_batch.bench.scale.simulated_cluster import SimulatedCluster, Timing
from flux_batch.engine.ray_handle import WorkerHandle
from flux_batch.engine.ray_pool import Pool, RayPool
from flux_batch.engine.stop import Stop
from flux_batch.telemetry import EngineState
from helpers.toil import make_shards

EVEN = Timing(shard_s=3.0, finish_s=0.1, open_s=1.0)


def test_workers_stay_busy_and_a_turn_looks_at_as_many_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, is_free = Counter[int](), WorkerHandle.is_free
    number = 0

    def counted(worker: WorkerHandle) -> bool:
        looks[number] += 1
        return bool(is_free.__get__(worker))

    monkeypatch.setattr(WorkerHandle, "is_free", property(counted))
    for number in (4, 40):
        figures = bench_driver([number], 1000, speedup=100, spread=10, slow_share=0.03, slow_factor=3)
        (run,) = figures["runs"]
        assert run["least_busy"] >= 0.98
        assert run["answers"] >= 2000
    assert looks[40] < 1.5 * looks[4]
    assert format_driver(figures).splitlines()[2].startswith("40 ")


def test_the_last_shards_of_a_run_take_a_small_part_of_it() -> None:
    (run,) = bench_driver([100], 1000, speedup=10, spread=10, slow_share=0.03, slow_factor=3)["runs"]
    assert run["last_s"] <= 0.05 * run["run_s"]


def test_a_slow_worker_at_the_end_gets_help_and_is_stopped() -> None:
    cluster = SimulatedCluster(Timing(shard_s=3.0, finish_s=0.1, open_s=1.0, slow_share=0.2, slow_factor=1000))
    pool = Pool(RayPool(10, slow_s=1), cluster, make_shards(200), Stop(), EngineState(), lambda **gauges: None)
    results = [result.shard for result in pool.results()]
    assert sorted(results) == list(range(200))
    assert cluster.clock() < 300
    pool.end()


def test_a_stop_ends_the_loop_with_what_is_in_hand() -> None:
    cluster, stop = SimulatedCluster(EVEN), Stop()
    pool = Pool(RayPool(4), cluster, make_shards(100), stop, EngineState(), lambda **gauges: None)
    results = [stop.request("enough") or result.shard for result in pool.results()]
    assert 1 <= len(results) <= 8
    assert pool.queue.num_waiting >= 92
    pool.end()
