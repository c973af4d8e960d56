import threading

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


def test_time_counts_also_for_what_fails() -> None:
    tally = Tally("cats")
    with pytest.raises(ValueError, match="no"), tally.timed("make"):
        raise ValueError("no")
    assert 0 <= tally.sums()[Sum("stage_seconds", "make")] < 1


def test_levels_rise_and_fall() -> None:
    tally = Tally("cats")
    tally.shift("queue", 3)
    tally.shift("queue", -2)
    assert tally.levels() == {"queue": 1}
