"""Starts of many workers on many nodes, some of which cannot: on a cluster that is simulated."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest

from flux_batch.bench.scale.simulated_cluster import SimulatedCluster, SimulatedWorker, Timing
from flux_batch.engine.failure import Failure
from flux_batch.engine.ray_pool import Pool, RayPool
from flux_batch.engine.stop import Stop
from flux_batch.errors import DeviceFatal, DiskFull, FluxBatchError
from flux_batch.telemetry import EngineState
from helpers.toil import make_shards

WORKERS_A_NODE = 8


class Starts:
    """The starts of all workers: of which node, and after which pause; those of `broken` nodes fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: set[int], error: FluxBatchError) -> None:
        self.pauses: list[float] = []
        self.of_node: Counter[int] = Counter()
        load = SimulatedWorker.open

        def counted(one: SimulatedWorker, call: Future[Any], after_s: float) -> None:
            # A process that replaces another of a node whose GPUs are free comes to that node.
            node = one.number // WORKERS_A_NODE if one.number < 24 else min(broken, default=0)
            self.pauses.append(after_s)
            self.of_node[node] += 1
            if node in broken:
                one.cluster.answer(call, 0.01, Failure.of(error))
            else:
                load(one, call, after_s)

        def node_id(one: SimulatedWorker, call: Future[Any]) -> None:
            node = one.number // WORKERS_A_NODE if one.number < 24 else min(broken, default=0)
            call.set_result(f"node-{node}")

        monkeypatch.setattr(SimulatedWorker, "open", counted)
        monkeypatch.setattr(SimulatedWorker, "node_id", node_id)


def run(num_workers: int, num_shards: int) -> list[str]:
    """Run shards. Returns: the workers that have made them."""
    cluster = SimulatedCluster(Timing(shard_s=30.0, finish_s=0.1, open_s=5.0))
    options = RayPool(num_workers, max_attempts=3)
    pool = Pool(options, cluster, make_shards(num_shards), Stop(), EngineState(), lambda **gauges: None)
    results = list(pool.results())
    assert sorted(result.shard for result in results) == list(range(num_shards))
    pool.end()
    return [result.worker for result in results]


@pytest.mark.parametrize("error", [DiskFull("/cache: no room"), DeviceFatal("no CUDA-capable device is detected")])
def test_a_node_whose_workers_cannot_start_costs_itself(monkeypatch: pytest.MonkeyPatch, error: FluxBatchError) -> None:
    starts = Starts(monkeypatch, {1}, error)
    makers = {int(worker) // WORKERS_A_NODE for worker in run(24, 200)}
    assert makers == {0, 2}
    assert starts.of_node[0] == starts.of_node[2] == WORKERS_A_NODE
    # 400 s of run, and pauses of up to a minute.
    assert WORKERS_A_NODE < starts.of_node[1] < 40 * WORKERS_A_NODE


def test_a_disk_that_is_too_small_on_every_node_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(monkeypatch, {0, 1, 2}, DiskFull("/cache: no room"))
    with pytest.raises(DiskFull, match="/cache: no room"):
        run(24, 200)
    assert starts.of_node == {0: 8, 1: 8, 2: 8}


def test_a_thousand_workers_ask_for_their_model_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(monkeypatch, set(), DiskFull())
    run(1000, 1000)
    assert len(starts.pauses) == 1000
    in_second = Counter(int(pause) for pause in starts.pauses)
    assert set(in_second) == set(range(10))  # a hundred a second
    assert max(in_second.values()) < 150

    starts.pauses.clear()
    run(1, 1)
    assert starts.pauses == [0.0]
