"""The end of a run whose slow worker ignores that another one was quicker, on a simulated cluster."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from flux_batch.bench.scale.simulated_cluster import SimulatedCluster, SimulatedWorker, Timing
from flux_batch.engine.ray_pool import Pool, RayPool
from flux_batch.engine.stop import Stop
from flux_batch.telemetry import EngineState
from helpers.toil import make_shards


def test_who_was_too_slow_does_not_hold_up_a_finished_run_for_longer_than_a_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = SimulatedCluster(Timing(shard_s=10.0, finish_s=0.1, open_s=5.0))
    make = SimulatedWorker.make
    silent_since: list[float] = []

    def make_or_hang(one: SimulatedWorker, call: Future[Any], *what: Any) -> None:
        if one.number == 0:
            silent_since.append(cluster.clock())
        else:
            make(one, call, *what)

    def idle_s(one: SimulatedWorker, call: Future[Any]) -> None:
        cluster.answer(call, 0.0, 0.0 if one.number else cluster.clock() - silent_since[0])

    monkeypatch.setattr(SimulatedWorker, "make", make_or_hang)
    monkeypatch.setattr(SimulatedWorker, "stop", lambda one, call: None)
    monkeypatch.setattr(SimulatedWorker, "idle_s", idle_s)
    options = RayPool(2, hang_s=900, drain_s=25, slow_s=30)
    pool = Pool(options, cluster, make_shards(4), Stop(), EngineState(), lambda **gauges: None)

    results, ended = [], 0.0
    for result in pool.results():
        results.append((result.shard, result.worker))
        ended = cluster.clock()
    waited_s = cluster.clock() - ended
    pool.end()

    assert sorted(results) == [(index, "1") for index in range(4)]
    assert len(silent_since) == 1
    assert 24 < waited_s < 100  # includes the driver's own seconds
    assert not pool.workers
