import pytest

from flux_batch.engine.shard_queue import ShardQueue, Task
from flux_batch.records import Attempt
from helpers.runners import make_shards


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take(queue: ShardQueue) -> Task:
    task = queue.next()
    assert task is not None
    return task


def order(queue: ShardQueue) -> list[int]:
    return [task.shard.index for task in iter(queue.next, None)]


def test_shards_are_given_out_in_order_and_settled_by_their_results() -> None:
    queue = ShardQueue(make_shards(2))
    first, second = take(queue), take(queue)
    assert (first.shard.index, second.shard.index, queue.next()) == (0, 1, None)
    assert first.attempt == Attempt()
    assert queue.done(first) == []
    assert not queue.is_settled
    assert queue.done(second) == []
    assert queue.is_settled


def test_a_shard_that_only_has_to_be_finished_gets_no_second_worker() -> None:
    clock = Clock()
    queue = ShardQueue(make_shards(3), clock=clock)
    first, second, third = take(queue), take(queue), take(queue)
    clock.now = 1
    queue.done(first)
    clock.now = 100
    queue.made(second)
    assert queue.num_alone == 1
    duplicate = queue.second(2, 10)
    assert duplicate is not None
    assert duplicate.shard == third.shard
    queue.put_aside(second)
    assert take(queue).shard == second.shard
    assert queue.num_alone == 1


def test_a_failure_counts_and_the_last_one_is_the_result() -> None:
    queue = ShardQueue(make_shards(2), max_attempts=2)
    assert queue.failed(take(queue), "out of luck") is None
    take(queue)
    task = take(queue)
    assert (task.shard.index, task.attempt.number) == (0, 2)
    result = queue.failed(task, "out of luck")
    assert result is not None
    assert result.error == "out of luck (attempt 2)"


def test_losses_are_told_to_the_next_worker_and_end_only_when_rows_cannot_be_the_reason() -> None:
    queue = ShardQueue(make_shards(1), max_attempts=1)
    assert queue.lost(take(queue), "its worker died") is None
    task = take(queue)
    assert task.attempt == Attempt(lost=1, reason="its worker died")
    assert queue.lost(task, "no sign of life") is None
    result = queue.lost(take(queue), "its worker died")
    assert result is not None
    assert result.error == "3 workers were lost on it; the last: its worker died"
    assert queue.is_settled


def test_a_shard_on_which_a_worker_was_lost_is_suspect_until_it_is_given_out() -> None:
    queue = ShardQueue(make_shards(1))
    assert not queue.is_next_suspect
    queue.lost(take(queue), "its worker died")
    assert queue.is_next_suspect
    take(queue)
    assert not queue.is_next_suspect


def test_a_shard_put_aside_is_the_next_and_one_that_failed_the_last() -> None:
    queue = ShardQueue(make_shards(4))
    first, second = take(queue), take(queue)
    queue.failed(first, "out of luck")
    queue.put_aside(second)
    assert order(queue) == [1, 2, 3, 0]


def test_a_shard_is_handed_over_from_its_end_while_its_worker_leaves() -> None:
    queue = ShardQueue(make_shards(2))
    leaving = take(queue)
    queue.hand_over(leaving)
    assert queue.num_waiting == 2
    task = take(queue)
    assert (task.shard.index, task.attempt.from_end) == (0, True)
    queue.put_aside(leaving)
    assert order(queue) == [1]
    assert queue.done(task) == []


def test_a_shard_whose_leaving_worker_has_gone_is_begun_at_its_beginning() -> None:
    queue = ShardQueue(make_shards(1))
    leaving = take(queue)
    queue.hand_over(leaving)
    queue.put_aside(leaving)
    assert not take(queue).attempt.from_end
    assert queue.next() is None


def test_a_leaving_worker_that_finishes_takes_its_shard_out_of_the_queue() -> None:
    queue = ShardQueue(make_shards(1))
    leaving = take(queue)
    queue.hand_over(leaving)
    assert queue.done(leaving) == []
    assert queue.next() is None
    assert queue.is_settled


def slow_tail(min_age_s: float = 0.0) -> tuple[ShardQueue, Task, Task | None, Clock]:
    """Two shards of 10 s and one that has run for 25 s, with the second task at it."""
    clock = Clock()
    queue = ShardQueue(make_shards(3), clock=clock)
    slow, *others = take(queue), take(queue), take(queue)
    clock.now = 10
    for task in others:
        queue.done(task)
    assert queue.second(2, min_age_s) is None
    clock.now = 25
    return queue, slow, queue.second(2, min_age_s), clock


def test_a_slow_shard_gets_one_second_worker_and_one_result() -> None:
    queue, slow, second, clock = slow_tail()
    assert second is not None
    assert (second.shard, second.attempt.from_end) == (slow.shard, True)
    assert (queue.second(2, 0), queue.num_alone) == (None, 0)
    assert queue.done(second) == [slow]
    assert queue.is_settled
    assert queue.done(slow) is None
    clock.now = 26
    assert queue.next() is None


def test_a_young_shard_gets_no_second_worker() -> None:
    assert slow_tail(min_age_s=30)[2] is None


@pytest.mark.parametrize("end", ["failed", "lost"])
def test_while_one_of_two_goes_on_the_end_of_the_other_changes_nothing(end: str) -> None:
    queue, slow, second, _ = slow_tail()
    assert second is not None
    assert getattr(queue, end)(slow, "bad luck") is None
    assert queue.next() is None
    assert queue.done(second) == []


def test_what_comes_after_the_result_does_not_matter() -> None:
    queue, slow, second, _ = slow_tail()
    assert second is not None
    queue.done(second)
    assert queue.lost(slow, "its worker died") is None
    assert (queue.next(), queue.is_settled) == (None, True)


def test_no_second_worker_while_shards_wait() -> None:
    clock = Clock()
    queue = ShardQueue(make_shards(3), clock=clock)
    take(queue)
    queue.done(take(queue))
    clock.now = 1000
    assert queue.second(2, 0) is None
