import pytest

from flux_batch.engine.failure import Failure, FailureKind
from flux_batch.engine.shard_queue import ShardQueue, Task
from flux_batch.errors import CheckpointError, Interrupted
from flux_batch.records import Attempt, ShardResult
from helpers.toil import make_shards


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take(queue: ShardQueue) -> Task:
    task = queue.next()
    assert task is not None
    return task


def succeed(queue: ShardQueue, task: Task) -> bool:
    """Settle a task with a result. Returns: whether this is the first result of its shard."""
    result = ShardResult(shard=task.shard.index)
    return queue.settle(task, result) is result


def fail(queue: ShardQueue, task: Task) -> ShardResult | None:
    return queue.settle(task, Failure("shard_failed", "out of luck"))


def order(queue: ShardQueue) -> list[int]:
    return [task.shard.index for task in iter(queue.next, None)]


def test_shards_are_given_out_in_order_and_settled_by_their_results() -> None:
    queue = ShardQueue(make_shards(2))
    first, second = take(queue), take(queue)
    assert (first.shard.index, second.shard.index, queue.next()) == (0, 1, None)
    assert first.attempt == Attempt()
    assert succeed(queue, first)
    assert not queue.is_settled
    assert succeed(queue, second)
    assert queue.is_settled


def test_a_shard_that_only_has_to_be_finished_gets_no_second_worker() -> None:
    clock = Clock()
    queue = ShardQueue(make_shards(3), clock=clock)
    first, second, third = take(queue), take(queue), take(queue)
    clock.now = 1
    succeed(queue, first)
    clock.now = 100
    queue.mark_made(second)
    assert queue.num_alone == 1
    duplicate = queue.speculate(2, 10)
    assert duplicate is not None
    assert duplicate.shard == third.shard
    queue.requeue(second)
    assert take(queue).shard == second.shard
    assert queue.num_alone == 1


def test_a_failure_counts_and_the_last_one_is_the_result() -> None:
    queue = ShardQueue(make_shards(2), max_attempts=2)
    assert fail(queue, take(queue)) is None
    take(queue)
    task = take(queue)
    assert (task.shard.index, task.attempt.number) == (0, 2)
    result = fail(queue, task)
    assert result is not None
    assert result.error == "out of luck (attempt 2)"


def test_losses_are_told_to_the_next_worker_and_end_only_when_rows_cannot_be_the_reason() -> None:
    queue = ShardQueue(make_shards(1), max_attempts=1)
    assert queue.lose(take(queue), "its worker died") is None
    task = take(queue)
    assert task.attempt == Attempt(lost=1, reason="its worker died")
    assert queue.lose(task, "no progress") is None
    result = queue.lose(take(queue), "its worker died")
    assert result is not None
    assert result.error == "3 workers were lost on it; the last: its worker died"
    assert queue.is_settled


def test_a_shard_on_which_a_worker_was_lost_is_isolated_until_it_is_given_out() -> None:
    queue = ShardQueue(make_shards(1))
    assert not queue.is_next_isolated
    queue.lose(take(queue), "its worker died")
    assert queue.is_next_isolated
    take(queue)
    assert not queue.is_next_isolated


def test_a_requeued_shard_is_the_next_and_one_that_failed_the_last() -> None:
    queue = ShardQueue(make_shards(4))
    first, second = take(queue), take(queue)
    fail(queue, first)
    queue.requeue(second)
    assert order(queue) == [1, 2, 3, 0]


def test_a_shard_is_handed_over_in_reverse_order_while_its_worker_leaves() -> None:
    queue = ShardQueue(make_shards(2))
    leaving = take(queue)
    queue.hand_over(leaving)
    assert queue.num_waiting == 2
    task = take(queue)
    assert (task.shard.index, task.attempt.reverse_order) == (0, True)
    queue.requeue(leaving)
    assert order(queue) == [1]
    assert succeed(queue, task)


def test_a_shard_whose_leaving_worker_has_gone_is_begun_at_its_beginning() -> None:
    queue = ShardQueue(make_shards(1))
    leaving = take(queue)
    queue.hand_over(leaving)
    queue.requeue(leaving)
    assert not take(queue).attempt.reverse_order
    assert queue.next() is None


def test_a_leaving_worker_that_finishes_takes_its_shard_out_of_the_queue() -> None:
    queue = ShardQueue(make_shards(1))
    leaving = take(queue)
    queue.hand_over(leaving)
    assert succeed(queue, leaving)
    assert queue.next() is None
    assert queue.is_settled


def slow_tail(min_age_s: float = 0.0) -> tuple[ShardQueue, Task, Task | None, Clock]:
    """Two shards of 10 s, and one that has run for 25 s and is also in a second task."""
    clock = Clock()
    queue = ShardQueue(make_shards(3), clock=clock)
    slow, *others = take(queue), take(queue), take(queue)
    clock.now = 10
    for task in others:
        succeed(queue, task)
    assert queue.speculate(2, min_age_s) is None
    clock.now = 25
    return queue, slow, queue.speculate(2, min_age_s), clock


def test_a_slow_shard_gets_one_second_worker_and_one_result() -> None:
    queue, slow, second, clock = slow_tail()
    assert second is not None
    assert (second.shard, second.attempt.reverse_order) == (slow.shard, True)
    assert (queue.speculate(2, 0), queue.num_alone) == (None, 0)
    assert succeed(queue, second)
    assert list(queue.pointless(slow.shard.index)) == [slow]
    assert queue.is_settled
    assert not succeed(queue, slow)
    clock.now = 26
    assert queue.next() is None


def test_a_young_shard_gets_no_second_worker() -> None:
    assert slow_tail(min_age_s=30)[2] is None


@pytest.mark.parametrize("kind", ["shard_failed", "device_lost", "stopped", "storage_unavailable"])
def test_while_one_of_two_goes_on_the_end_of_the_other_changes_nothing(kind: FailureKind) -> None:
    queue, slow, second, _ = slow_tail()
    assert second is not None
    assert queue.settle(slow, Failure(kind, "bad luck")) is None
    assert queue.next() is None
    assert succeed(queue, second)


def test_what_comes_after_the_result_does_not_matter() -> None:
    queue, slow, second, _ = slow_tail()
    assert second is not None
    succeed(queue, second)
    assert queue.lose(slow, "its worker died") is None
    assert (queue.next(), queue.is_settled) == (None, True)


def test_no_second_worker_while_shards_wait() -> None:
    clock = Clock()
    queue = ShardQueue(make_shards(3), clock=clock)
    take(queue)
    succeed(queue, take(queue))
    clock.now = 1000
    assert queue.speculate(2, 0) is None


def outage(waited_s: float = 0.0) -> Failure:
    return Failure("storage_unavailable", "s3://bucket: 503", waited_s=waited_s)


def test_a_run_error_ends_the_run() -> None:
    queue = ShardQueue(make_shards(1))
    with pytest.raises(CheckpointError, match="img_in"):
        queue.settle(take(queue), Failure("run_failed", "x", error=CheckpointError("img_in is missing")))


def test_a_stop_and_an_outage_cost_a_shard_nothing() -> None:
    queue = ShardQueue(make_shards(2), max_attempts=1)
    for failure in (Failure("stopped", "x"), outage(), outage()):
        task = take(queue)
        assert (task.shard.index, task.attempt) == (0, Attempt())
        assert queue.settle(task, failure) is None
    assert order(queue) == [0, 1]


def test_an_outage_lasts_from_the_first_failure_in_a_row() -> None:
    clock = Clock()
    queue = ShardQueue(make_shards(3), outage_s=60, clock=clock)
    queue.settle(take(queue), outage())
    clock.now += 59
    queue.settle(take(queue), outage())
    succeed(queue, take(queue))
    clock.now += 59
    queue.settle(take(queue), outage())
    clock.now += 61
    with pytest.raises(Interrupted, match=r"storage has been unavailable for 61 s \(s3://bucket: 503\); run the same"):
        queue.settle(take(queue), outage())


def test_a_store_that_has_waited_for_the_whole_outage_ends_the_run_at_once() -> None:
    clock = Clock()
    queue = ShardQueue(make_shards(1), outage_s=60, clock=clock)
    task = take(queue)
    clock.now += 300
    with pytest.raises(Interrupted, match="unavailable for 60 s"):
        queue.settle(task, outage(waited_s=60))


def test_a_store_that_only_one_worker_cannot_reach_ends_no_run() -> None:
    clock = Clock()
    queue = ShardQueue(make_shards(2), outage_s=60, clock=clock)
    cut_off, other = take(queue), take(queue)
    clock.now += 60
    succeed(queue, other)
    clock.now += 1
    assert queue.settle(cut_off, outage(waited_s=61)) is None
    assert order(queue) == [0]
