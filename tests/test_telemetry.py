from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from flux_batch.telemetry import CounterKey, Heartbeat, Metrics, ShardCount, WorkerFigures, WorkerState


def test_counters_grow_by_name_and_label_from_any_thread() -> None:
    metrics = Metrics("cats")
    threads = [threading.Thread(target=lambda: [metrics.add("images") for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics.add("failures", 2, "RowError")
    assert metrics.counters() == {CounterKey("images"): 4000, CounterKey("failures", "RowError"): 2}


def test_time_counts_also_for_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("flux_batch.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    metrics = Metrics("cats")

    def fail() -> None:
        nonlocal now
        now += 4.0
        raise ValueError("no")

    with metrics.timed("make"):
        now += 2.5
    with pytest.raises(ValueError, match="no"), metrics.timed("make"):
        fail()
    assert metrics.counters() == {CounterKey("stage_seconds", "make"): 6.5}


def test_gauges_rise_and_fall() -> None:
    metrics = Metrics("cats")
    metrics.gauge_add("queue", 3)
    metrics.gauge_add("queue", -2)
    assert metrics.gauges() == {"queue": 1}


def test_only_a_busy_process_is_expected_to_show_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("flux_batch.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    heartbeat = Heartbeat()
    heartbeat.beat()
    heartbeat.beat("make")
    assert heartbeat.idle_s() == 0

    with heartbeat.busy("make"):
        now = 107.0
        assert heartbeat.idle_s() == 7
        heartbeat.beat("make")
        now = 108.0
        assert heartbeat.idle_s() == 1
    now = 500.0
    assert heartbeat.idle_s() == 0

    with pytest.raises(ValueError, match="broken"), heartbeat.busy("make"):
        raise ValueError("broken")
    now = 900.0
    assert heartbeat.idle_s() == 0


def test_progress_of_one_activity_does_not_hide_that_another_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("flux_batch.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    heartbeat = Heartbeat()

    with heartbeat.busy("finish"), heartbeat.busy("make"):
        now = 107.0
        heartbeat.beat("make")
        assert heartbeat.idle_s() == 7
        heartbeat.beat("finish")
        now = 110.0
        assert heartbeat.idle_s() == 3
        heartbeat.beat()
        assert heartbeat.idle_s() == 0
        heartbeat.beat("make")
        now = 111.0
    assert heartbeat.idle_s() == 0


def test_a_worker_has_one_list_of_its_shards_which_figures_do_not_replace() -> None:
    """Otherwise a shard that another thread adds at the same time would only be in the old list."""
    worker = WorkerState(1)
    for shard in (0, 1):
        worker.begin(shard)
    in_hand = worker.in_hand

    worker.update(WorkerFigures({0: ShardCount(4, 2), 7: ShardCount(4, 4)}, 1.5))

    assert worker.in_hand is in_hand
    assert (in_hand, worker.busy_s) == ({0: ShardCount(4, 2), 1: ShardCount()}, 1.5)
