from flux_batch.engine.backoff import LONGEST_PAUSE_S, Backoff


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_up_to_the_longest_and_differ() -> None:
    backoff = Backoff(clock=Clock())
    lengths = [backoff.begin() for _ in range(30)]
    for number, length in enumerate(lengths):
        assert 2.5 <= length <= min(LONGEST_PAUSE_S, 5 * 2**number)
    assert len(set(lengths)) > 20
    assert max(lengths) > 10


def test_a_pause_is_over_in_time_and_a_success_makes_the_next_one_short() -> None:
    clock = Clock()
    backoff = Backoff(clock=clock)
    assert backoff.is_over
    for _ in range(5):
        length = backoff.begin()
    clock.now += length - 0.01
    assert not backoff.is_over
    clock.now += 0.02
    assert backoff.is_over
    backoff.reset()
    assert backoff.begin() <= 5
