import threading
from types import SimpleNamespace

import pytest

from flux_batch.telemetry import Sum, Tally


def test_sums_grow_by_name_and_kind_from_any_thread() -> None:
    tally = Tally("cats")
    threads = [threading.Thread(target=lambda: [tally.add("images") for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.add("failures", 2, "RowError")
    assert tally.sums() == {Sum("images"): 4000, Sum("failures", "RowError"): 2}


def test_time_counts_also_for_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("flux_batch.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    tally = Tally("cats")

    def fail() -> None:
        nonlocal now
        now += 4.0
        raise ValueError("no")

    with tally.timed("make"):
        now += 2.5
    with pytest.raises(ValueError, match="no"), tally.timed("make"):
        fail()
    assert tally.sums() == {Sum("stage_seconds", "make"): 6.5}


def test_levels_rise_and_fall() -> None:
    tally = Tally("cats")
    tally.shift("queue", 3)
    tally.shift("queue", -2)
    assert tally.levels() == {"queue": 1}
