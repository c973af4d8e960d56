"""Starts of many workers on many nodes, some of which fail, on a simulated cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from concurrent.futures import Future
from typing import Any

import pytest

from flux_batch.bench.scale.simulated_cluster import SimulatedCluster, SimulatedWorker, Timing
from flux_batch.engine.failure import Failure
from flux_batch.engine.ray_pool import Pool, RayPool
from flux_batch.engine.stop import Stop
from flux_batch.errors import DeviceFatal, DiskFull, FluxBatchError, RunIncomplete
from flux_batch.telemetry import EngineState
from helpers.toil import make_shards

WORKERS_A_NODE = 8


class Starts:
    """Records the node and the pause of each worker's start; starts on `broken` nodes fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: set[int], error: FluxBatchError) -> None:
        self.pauses: list[float] = []
        self.of_node: Counter[int] = Counter()
        load = SimulatedWorker.open

        def counted(one: SimulatedWorker, call: Future[Any], after_s: float) -> None:
            # A replacement starts on the node with free GPUs, which is that of the failed worker.
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


class Hangs:
    """Makes the workers with `silent` numbers hang while they load; all others show signs of life."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, silent: Container[int]) -> None:
        self.killed: list[int] = []
        self.num_started = 0
        began: dict[int, float] = {}
        load, end = SimulatedWorker.open, SimulatedWorker.end

        def opened(one: SimulatedWorker, call: Future[Any], after_s: float) -> None:
            self.num_started += 1
            began[one.number] = one.cluster.clock()
            if one.number not in silent:
                load(one, call, after_s)

        def idle_s(one: SimulatedWorker, call: Future[Any]) -> None:
            silent_s = one.cluster.clock() - began[one.number] if one.number in silent else 0.0
            one.cluster.answer(call, 0.0, silent_s)

        def ended(one: SimulatedWorker) -> None:
            if one.number in silent:
                self.killed.append(one.number)
            end(one)

        monkeypatch.setattr(SimulatedWorker, "open", opened)
        monkeypatch.setattr(SimulatedWorker, "idle_s", idle_s)
        monkeypatch.setattr(SimulatedWorker, "end", ended)


def run(num_workers: int, num_shards: int, open_s: float = 5.0) -> list[str]:
    """Run shards. Returns: the worker of each shard."""
    cluster = SimulatedCluster(Timing(shard_s=30.0, finish_s=0.1, open_s=open_s))
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
    # The run takes 400 s, with pauses of up to a minute.
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
    assert set(in_second) == set(range(10))  # a hundred per second
    assert max(in_second.values()) < 150

    starts.pauses.clear()
    run(1, 1)
    assert starts.pauses == [0.0]


@pytest.mark.timeout(60)
def test_the_only_worker_is_replaced_if_it_hangs_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = Hangs(monkeypatch, silent={0, 1})
    assert run(1, 3) == ["2", "2", "2"]
    assert (hangs.killed, hangs.num_started) == ([0, 1], 3)


@pytest.mark.timeout(60)
def test_a_model_that_never_loads_ends_the_run_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = Hangs(monkeypatch, silent=range(10**6))
    with pytest.raises(
        RunIncomplete,
        match=r"4 workers in a row died while they started; the last: no progress for \d+ s while it loaded its model "
        r"\(failures\.load_hang_s\)",
    ):
        run(1, 3)
    assert (hangs.killed, hangs.num_started) == ([0, 1, 2, 3], 4)


def test_a_worker_that_loads_for_long_with_signs_of_life_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = Hangs(monkeypatch, silent=())
    assert set(run(2, 6, open_s=3 * RayPool(1).load_hang_s)) == {"0", "1"}
    assert hangs.num_started == 2
