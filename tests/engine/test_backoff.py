import pytest

from flux_batch.engine.backoff import LONGEST_REST_S, Outage, Rest
from flux_batch.errors import Interrupted


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rests_double_up_to_the_longest_and_differ() -> None:
    rest = Rest(clock=Clock())
    lengths = [rest.begin() for _ in range(30)]
    for number, length in enumerate(lengths):
        full = min(LONGEST_REST_S, 5 * 2**number)
        assert full / 2 <= length <= full
    assert len(set(lengths)) > 20


def test_a_rest_is_over_in_time_and_a_success_makes_the_next_one_short() -> None:
    clock = Clock()
    rest = Rest(clock=clock)
    assert rest.is_over
    for _ in range(5):
        length = rest.begin()
    clock.now += length - 0.01
    assert not rest.is_over
    clock.now += 0.02
    assert rest.is_over
    rest.reset()
    assert rest.begin() <= 5


def test_an_outage_lasts_from_the_first_failure_in_a_row() -> None:
    clock = Clock()
    outage = Outage(60, clock=clock)
    outage.meet("shard 1", "503")
    clock.now += 59
    outage.meet("shard 2", "503")
    outage.end()
    clock.now += 59
    outage.meet("shard 1", "503")
    clock.now += 61
    with pytest.raises(Interrupted, match=r"storage has failed for 61 s \(the disk of /out is full\)"):
        outage.meet("shard 3", "the disk of /out is full")
