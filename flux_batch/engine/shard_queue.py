"""The shards of a run: those that wait, those in progress, and what becomes of one when its worker is done with it.

Holds the rules of trying again, without processes and without the clock of a cluster: knows neither Ray nor the
contents of a shard.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flux_batch.engine.failure import Failure
from flux_batch.errors import Interrupted, RunIncomplete
from flux_batch.records import Attempt, Shard, ShardResult

log = logging.getLogger(__name__)

# Finished shards whose median duration is the usual one: the last ones, since the pace of a run may change.
_RECENT_SHARDS = 1000
# Losses that each row of a shard may cost: a worker makes an image that kills it twice, alone, and then gives it up.
_LOSSES_PER_ROW = 2


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """One attempt at a shard by one worker, in progress since `began`."""

    shard: Shard
    attempt: Attempt
    began: float


class _Waiting:
    """The shards that no worker has, in the order in which they are given out.

    Those that were never begun stay in the sequence they came in, which makes each when it is asked for.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._first: deque[Shard] = deque()
        self._fresh = shards
        self._num_begun = 0
        self._last: deque[Shard] = deque()

    def __len__(self) -> int:
        return len(self._first) + len(self._fresh) - self._num_begun + len(self._last)

    def first(self) -> Shard:
        """Return the next shard, which goes on waiting."""
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
        """Remove a shard that was put back. Raises: ValueError if it is not here."""
        (self._first if shard in self._first else self._last).remove(shard)


class ShardQueue:
    """The shards of a run. Each task given out comes back by exactly one of `settle`, `lose` and `requeue`.

    A failure is an answer: it counts, and after `max_attempts` of them the shard is given up. A loss is the end of a
    worker without an answer: the shard is tried again more carefully, see Attempt, and is given up only after
    `max_attempts` losses plus 2 a row, which is more than its worker needs to isolate every row that kills it.
    Unavailable storage costs a shard nothing, but ends the run once it has lasted `outage_s`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        max_attempts: int = 3,
        outage_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = _Waiting(shards)
        self._max_attempts = max_attempts
        self._outage_s = outage_s
        self._clock = clock
        self._in_progress: dict[int, list[Task]] = {}
        self._leaving: set[Task] = set()  # tasks whose worker was told to stop
        self._made: set[Task] = set()  # tasks that only have to be finished
        self._settled: set[int] = set()
        self._requeued: set[int] = set()  # shards that wait again
        self._failures: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._loss_reasons: dict[int, str] = {}  # of the last loss
        self._handed_over: set[int] = set()  # shards whose first images a leaving worker still makes
        self._durations: deque[float] = deque(maxlen=_RECENT_SHARDS)
        self._last_success = -math.inf
        self._outage_began = math.inf
        self._is_outage_logged = False

    @property
    def num_waiting(self) -> int:
        """The number of shards that no worker has."""
        return len(self._waiting)

    @property
    def is_next_isolated(self) -> bool:
        """True if workers were lost on the next shard. Its worker must have no other then, to show which one kills."""
        return bool(self._losses) and bool(self._waiting) and self._losses[self._waiting.first().index] > 0

    @property
    def is_settled(self) -> bool:
        """True if every shard has its result."""
        return not self._waiting and all(index in self._settled for index in self._in_progress)

    @property
    def num_alone(self) -> int:
        """The number of shards of a single worker, which a second one might speed up."""
        return len(self._alone())

    def has_result(self, task: Task) -> bool:
        """Return whether a task is pointless because its shard has its result."""
        return task.shard.index in self._settled

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

        It runs in reverse order. The limit is `factor` times the median of the finished shards, and at least
        `min_age_s`. Returns None while shards wait, before the first one is finished, and for a shard that has two
        workers.
        """
        alone = self._alone()
        if self._waiting or not self._durations or not alone:
            return None
        oldest = min(alone, key=lambda task: task.began)
        age = self._clock() - oldest.began
        if age <= max(min_age_s, factor * statistics.median(self._durations)):
            return None
        log.warning("shard %d: slow, %.0f s so far; a second worker starts from its end", oldest.shard.index, age)
        return self._begin(oldest.shard, reverse_order=True)

    def mark_made(self, task: Task) -> None:
        """Record that a task only has to be finished. No second worker starts for it."""
        self._made.add(task)

    def settle(self, task: Task, outcome: ShardResult | Failure) -> ShardResult | None:
        """Record how a task ended. The one rule for what each outcome means for its shard.

        Returns: the result of the shard if this decides it, None if it is tried again or had its result before.
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
        return None

    def lose(self, task: Task, reason: str) -> ShardResult | None:
        """Record that a worker died or was killed. Returns: the result of its shard if that is given up."""
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
        """Put an unfinished shard first in the queue, without counting anything against it."""
        self._return(task)
        self._wait(task.shard, is_next=True)

    def hand_over(self, task: Task) -> None:
        """Queue a shard for another worker, in reverse order.

        The worker that leaves finishes its current batch meanwhile.
        """
        self._leaving.add(task)
        self._handed_over.add(task.shard.index)
        self._wait(task.shard, is_next=True)

    def check_outage(self, subject: str, failure: Failure) -> None:
        """Raise Interrupted if storage has been unavailable for `outage_s`, without a success since.

        An outage began when the store that raised the failure first waited, which was before the failure.
        """
        now = self._clock()
        self._outage_began = min(self._outage_began, max(now - failure.waited_s, self._last_success))
        lasted = now - self._outage_began
        if lasted >= self._outage_s:
            raise Interrupted(
                f"storage has been unavailable for {lasted:.0f} s ({failure.message}); "
                "run the same command again once that is mended"
            )
        level = logging.DEBUG if self._is_outage_logged else logging.WARNING
        self._is_outage_logged = True
        log.log(level, "%s: %s; trying again, for up to %.0f s", subject, failure.message, self._outage_s - lasted)

    def _succeed(self, task: Task, result: ShardResult) -> ShardResult | None:
        self._return(task)
        if self._is_outage_logged:
            log.warning("shard %d: done, so the storage is back", task.shard.index)
        self._last_success, self._outage_began, self._is_outage_logged = self._clock(), math.inf, False
        if self.has_result(task):
            return None
        self._durations.append(self._clock() - task.began)
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
        return task

    def _return(self, task: Task) -> None:
        tasks = self._in_progress[task.shard.index]
        tasks.remove(task)
        if not tasks:
            del self._in_progress[task.shard.index]
        self._leaving.discard(task)
        self._made.discard(task)

    def _wait(self, shard: Shard, *, is_next: bool = False) -> None:
        """Queue a shard unless it is settled, queued, or with a worker that stays."""
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
        if shard.index in self._requeued:
            self._requeued.remove(shard.index)
            self._waiting.remove(shard)
        for per_shard in (self._failures, self._losses, self._loss_reasons):
            per_shard.pop(shard.index, None)

    def _give_up(self, shard: Shard, error: str) -> ShardResult:
        self._mark_settled(shard)
        return ShardResult(shard=shard.index, error=error)

    def _alone(self) -> list[Task]:
        alone = (tasks[0] for tasks in self._in_progress.values() if len(tasks) == 1)
        return [task for task in alone if task not in self._made and task.shard.index not in self._settled]
