"""The queue of a run's shards: waiting ones, those in progress, and the rules for retries.

It uses no processes and no cluster; it knows neither Ray nor the contents of a shard.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from flux_batch.engine.failure import Failure
from flux_batch.errors import Interrupted, RunIncomplete
from flux_batch.records import Attempt, Shard, ShardResult

log = logging.getLogger(__name__)

# The usual duration is the median of this many last shards, since the pace of a run may change.
_RECENT_SHARDS = 100
# Losses that a row may cause: an image that kills its worker is made alone twice, and then fails.
_LOSSES_PER_ROW = 2


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """One attempt at a shard by one worker, in progress since `began`."""

    shard: Shard
    attempt: Attempt
    began: float


class _Waiting:
    """The shards without a worker, in the order in which they are given out.

    Shards that were never begun stay in the given sequence, which creates each object only on access.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._first: deque[Shard] = deque()
        self._fresh = shards
        self._num_begun = 0
        self._last: deque[Shard] = deque()

    def __len__(self) -> int:
        return len(self._first) + len(self._fresh) - self._num_begun + len(self._last)

    def first(self) -> Shard:
        """Return the next shard without removing it."""
        shard = self.take()
        self.put_first(shard)
        return shard

    def take(self) -> Shard:
        """Remove and return the next shard."""
        if self._first:
            return self._first.popleft()
        if self._num_begun == len(self._fresh):
            return self._last.popleft()
        self._num_begun += 1
        return self._fresh[self._num_begun - 1]

    def put_first(self, shard: Shard) -> None:
        """Put a shard before all others."""
        self._first.appendleft(shard)

    def put_last(self, shard: Shard) -> None:
        """Put a shard behind all others."""
        self._last.append(shard)

    def remove(self, shard: Shard) -> None:
        """Remove a shard that was put back. Raises: ValueError if it does not wait."""
        (self._first if shard in self._first else self._last).remove(shard)


class _Settled:
    """The numbers of the shards with a result, in one byte each."""

    def __init__(self) -> None:
        self._marks = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, index: int) -> bool:
        return index < len(self._marks) and bool(self._marks[index])

    def add(self, index: int) -> None:
        """Add a number. Safe to call twice."""
        if index >= len(self._marks):
            self._marks.extend(bytes(max(index + 1, 2 * len(self._marks)) - len(self._marks)))
        self._count += not self._marks[index]
        self._marks[index] = 1


class _Durations:
    """The durations of the last finished shards, kept sorted for their median."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, seconds: float) -> None:
        """Add a duration, and drop the oldest if there are too many."""
        if len(self._recent) == _RECENT_SHARDS:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(seconds)
        insort(self._sorted, seconds)

    @property
    def median(self) -> float:
        """The usual duration, in seconds."""
        middle = len(self._sorted) // 2
        return (self._sorted[middle] + self._sorted[~middle]) / 2


class _Alone:
    """The tasks whose shard has only one worker, the oldest first."""

    def __init__(self) -> None:
        self._tasks: dict[int, Task] = {}
        self._by_age: list[tuple[float, int, Task]] = []  # a heap, also with tasks that were removed
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """Add a task. Safe to call twice."""
        if not self._has(task):
            self._tasks[task.shard.index] = task
            heappush(self._by_age, (task.began, next(self._numbers), task))

    def discard(self, index: int) -> None:
        """Remove the task of a shard, if it is here."""
        self._tasks.pop(index, None)
        if len(self._by_age) > 2 * len(self._tasks) + 64:
            self._by_age = [entry for entry in self._by_age if self._has(entry[2])]
            heapify(self._by_age)

    @property
    def oldest(self) -> Task | None:
        """The task that began first."""
        while self._by_age and not self._has(self._by_age[0][2]):
            heappop(self._by_age)
        return self._by_age[0][2] if self._by_age else None

    def _has(self, task: Task) -> bool:
        return self._tasks.get(task.shard.index) is task


class ShardQueue:
    """The shards of a run; each task comes back by exactly one of `settle`, `lose` and `requeue`.

    A failure is an error that a worker reports: after `max_attempts` failures the shard is given up. A loss is the end
    of a worker without a report: the shard is retried with more care (see Attempt), and is given up only after
    `max_attempts` losses plus 2 per row. That is more than workers need to isolate every row that kills them.
    Unavailable storage does not count against a shard, but ends the run after `outage_s`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        max_attempts: int = 3,
        outage_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = _Waiting(shards)
        self._num_shards = len(shards)
        self._max_attempts = max_attempts
        self._outage_s = outage_s
        self._clock = clock
        self._in_progress: dict[int, list[Task]] = {}
        self._leaving: set[Task] = set()  # tasks whose worker was told to stop
        self._made: set[Task] = set()  # tasks that only have to be finished
        self._settled = _Settled()
        self._alone = _Alone()
        self._requeued: set[int] = set()  # shards that were begun and wait again
        self._failures: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._loss_reasons: dict[int, str] = {}  # of the last loss
        self._handed_over: set[int] = set()  # shards that a leaving worker still makes from the start
        self._durations = _Durations()
        self._last_success = -math.inf
        self._outage_began = math.inf
        self._is_outage_logged = False

    @property
    def num_waiting(self) -> int:
        """The number of shards without a worker."""
        return len(self._waiting)

    @property
    def is_next_isolated(self) -> bool:
        """True if workers were lost on the next shard; its worker must then have no other, to find the cause."""
        return bool(self._losses) and bool(self._waiting) and self._losses[self._waiting.first().index] > 0

    @property
    def is_settled(self) -> bool:
        """True if every shard has its result."""
        return len(self._settled) == self._num_shards

    @property
    def num_alone(self) -> int:
        """The number of shards with a single worker, which a second one might speed up."""
        return len(self._alone)

    def pointless(self, index: int) -> Sequence[Task]:
        """Return the tasks of a shard that has a result from another task already."""
        return tuple(self._in_progress.get(index, ())) if index in self._settled else ()

    def next(self) -> Task | None:
        """Return a task for the next shard, None if none waits."""
        if not self._waiting:
            return None
        shard = self._waiting.take()
        self._requeued.discard(shard.index)
        has_leaving_worker = shard.index in self._handed_over and bool(self._in_progress.get(shard.index))
        self._handed_over.discard(shard.index)
        return self._begin(shard, reverse_order=has_leaving_worker)

    def speculate(self, factor: float, min_age_s: float) -> Task | None:
        """Return a second task for the oldest shard if it is far too slow.

        The task runs in reverse order. The limit is `factor` times the median of the finished shards, at least
        `min_age_s`. Returns: None while shards wait, before the first one is finished, and for a shard that has two
        workers.
        """
        if self._waiting or not self._durations or not (oldest := self._alone.oldest):
            return None
        age = self._clock() - oldest.began
        if age <= max(min_age_s, factor * self._durations.median):
            return None
        log.warning("shard %d: slow, %.0f s so far; a second worker starts from its end", oldest.shard.index, age)
        return self._begin(oldest.shard, reverse_order=True)

    def mark_made(self, task: Task) -> None:
        """Record that a task only has to be finished: no second worker starts for it."""
        self._made.add(task)
        self._note_alone(task.shard.index)

    def settle(self, task: Task, outcome: ShardResult | Failure) -> ShardResult | None:
        """Record how a task ended, and decide what that means for its shard.

        Returns: the result of the shard if this decides it; None if it is retried or had a result before.
        Raises: the error of a failed run; Interrupted if storage has been unavailable for `outage_s`.
        """
        if isinstance(outcome, ShardResult):
            return self._succeed(task, outcome)
        match outcome.kind:
            case "run_failed":
                raise outcome.error or RunIncomplete(outcome.message)
            case "shard_failed":
                return self._fail(task, outcome.message)
            case "device_lost":
                return self.lose(task, outcome.message)
            case "storage_unavailable":
                self.requeue(task)
                self.check_outage(f"shard {task.shard.index}", outcome)
            case "stopped":
                self.requeue(task)
            case "worker_failed":
                self._return(task)
                self._wait(task.shard)  # at the end: other shards may show that this worker can make one
        return None

    def lose(self, task: Task, reason: str) -> ShardResult | None:
        """Record that a worker died or was killed. Returns: the result of its shard if it is given up."""
        index = task.shard.index
        self._losses[index] += 1
        self._loss_reasons[index] = reason
        number = self._losses[index]
        self._return(task)
        limit = self._max_attempts + _LOSSES_PER_ROW * task.shard.num_rows
        if index not in self._settled and number >= limit and not self._in_progress.get(index):
            return self._give_up(task.shard, f"{number} workers were lost on it; the last: {reason}")
        if index not in self._settled:
            about = {"shard": index}
            log.warning(
                "shard %d: %s (%d workers lost so far); another one takes over",
                index,
                reason,
                number,
                extra=about,
            )
        self._wait(task.shard)
        return None

    def requeue(self, task: Task) -> None:
        """Put an unfinished shard first in the queue, without counting a failure or a loss."""
        self._return(task)
        self._wait(task.shard, is_next=True)

    def hand_over(self, task: Task) -> None:
        """Queue a shard for another worker, in reverse order.

        The leaving worker finishes its current batch meanwhile.
        """
        self._leaving.add(task)
        self._handed_over.add(task.shard.index)
        self._wait(task.shard, is_next=True)

    def check_outage(self, subject: str, failure: Failure) -> None:
        """Raise Interrupted if storage has been unavailable for `outage_s`, without a success since.

        The outage began when the store of the failed worker began to wait, which is `waited_s` before the failure.
        """
        now = self._clock()
        self._outage_began = min(self._outage_began, max(now - failure.waited_s, self._last_success))
        lasted = now - self._outage_began
        if lasted >= self._outage_s:
            raise Interrupted(
                f"storage has been unavailable for {lasted:.0f} s ({failure.message}); "
                "run the same command again once it is available"
            )
        level = logging.DEBUG if self._is_outage_logged else logging.WARNING
        self._is_outage_logged = True
        log.log(level, "%s: %s; trying again, for up to %.0f s", subject, failure.message, self._outage_s - lasted)

    def _succeed(self, task: Task, result: ShardResult) -> ShardResult | None:
        self._return(task)
        if self._is_outage_logged:
            log.warning("shard %d: done, so the storage is back", task.shard.index)
        self._last_success, self._outage_began, self._is_outage_logged = self._clock(), math.inf, False
        if task.shard.index in self._settled:
            return None
        self._durations.add(self._clock() - task.began)
        self._mark_settled(task.shard)
        return result

    def _fail(self, task: Task, reason: str) -> ShardResult | None:
        index = task.shard.index
        self._failures[index] += 1
        number = self._failures[index]
        self._return(task)
        if index not in self._settled and number >= self._max_attempts and not self._in_progress.get(index):
            return self._give_up(task.shard, f"{reason} (attempt {number})")
        if index not in self._settled:
            log.warning(
                "shard %d: %s; attempt %d of %d follows",
                index,
                reason,
                number + 1,
                max(number + 1, self._max_attempts),
                extra={"shard": index},
            )
        self._wait(task.shard)
        return None

    def _begin(self, shard: Shard, *, reverse_order: bool) -> Task:
        index = shard.index
        attempt = Attempt(
            number=self._failures[index] + 1,
            lost=self._losses[index],
            reason=self._loss_reasons.get(index, ""),
            reverse_order=reverse_order,
        )
        task = Task(shard, attempt, self._clock())
        self._in_progress.setdefault(index, []).append(task)
        self._note_alone(index)
        return task

    def _return(self, task: Task) -> None:
        tasks = self._in_progress[task.shard.index]
        tasks.remove(task)
        if not tasks:
            del self._in_progress[task.shard.index]
        self._leaving.discard(task)
        self._made.discard(task)
        self._note_alone(task.shard.index)

    def _wait(self, shard: Shard, *, is_next: bool = False) -> None:
        """Queue a shard unless it is settled, queued, or made by a worker that stays."""
        has_worker = any(task not in self._leaving for task in self._in_progress.get(shard.index, ()))
        if shard.index in self._settled or has_worker or shard.index in self._requeued:
            return
        self._requeued.add(shard.index)
        if is_next:
            self._waiting.put_first(shard)
        else:
            self._waiting.put_last(shard)

    def _mark_settled(self, shard: Shard) -> None:
        self._settled.add(shard.index)
        self._note_alone(shard.index)
        if shard.index in self._requeued:
            self._requeued.remove(shard.index)
            self._waiting.remove(shard)
        for per_shard in (self._failures, self._losses, self._loss_reasons):
            per_shard.pop(shard.index, None)

    def _give_up(self, shard: Shard, error: str) -> ShardResult:
        self._mark_settled(shard)
        return ShardResult(shard=shard.index, error=error)

    def _note_alone(self, index: int) -> None:
        """Record whether a second worker might speed up a shard; called after each change of its tasks."""
        tasks = self._in_progress.get(index, ())
        if len(tasks) == 1 and tasks[0] not in self._made and index not in self._settled:
            self._alone.add(tasks[0])
        else:
            self._alone.discard(index)
