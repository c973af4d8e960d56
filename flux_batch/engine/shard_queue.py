"""Which shards wait, which are in somebody's hands, and what becomes of them when a worker is done with one.

The rules of trying again, without a process or a clock of a cluster: knows neither Ray nor what a shard holds.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flux_batch.records import Attempt, Shard, ShardResult

log = logging.getLogger(__name__)

# Shards whose durations tell what is usual: the last ones, since a run may change its pace.
RECENT = 1000
# Losses that a shard may cost for each of its rows: a worker makes an image that kills alone twice, and gives it up.
LOSSES_PER_ROW = 2


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """One attempt at a shard, in the hands of one worker since `began`."""

    shard: Shard
    attempt: Attempt
    began: float


class ShardQueue:
    """The shards of a run. A task that was given out comes back by exactly one of done, failed, lost and put_aside.

    A failure is an answer: it counts, and after `max_attempts` of them the shard is given up. A loss is the end of a
    worker without an answer: the shard is tried again more carefully, see Attempt, and is given up only after
    `max_attempts` + 2 a row of them, which is more than its worker needs to find out every row that kills it.
    """

    def __init__(
        self, shards: Iterable[Shard], max_attempts: int = 3, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._waiting = deque(shards)
        self._max_attempts = max_attempts
        self._clock = clock
        self._in_hand: dict[int, list[Task]] = {}
        self._leaving: set[Task] = set()  # whose worker has been told to stop
        self._made: set[Task] = set()  # which only have to be finished
        self._settled: set[int] = set()
        self._back: set[int] = set()  # shards that wait not for the first time
        self._failures: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}  # of the last loss
        self._from_end: set[int] = set()  # shards whose first images somebody makes now
        self._durations: deque[float] = deque(maxlen=RECENT)

    @property
    def num_waiting(self) -> int:
        """Count the shards that nobody works on."""
        return len(self._waiting)

    @property
    def is_next_suspect(self) -> bool:
        """Whether workers were lost on the next shard: it must have its worker for itself, to show if it is why."""
        return bool(self._waiting) and self._losses[self._waiting[0].index] > 0

    @property
    def is_settled(self) -> bool:
        """Whether every shard has its result."""
        return not self._waiting and all(index in self._settled for index in self._in_hand)

    def next(self) -> Task | None:
        """Give out the next shard, if one waits."""
        if not self._waiting:
            return None
        shard = self._waiting.popleft()
        self._back.discard(shard.index)
        is_from_end = shard.index in self._from_end and bool(self._in_hand.get(shard.index))
        self._from_end.discard(shard.index)
        return self._begin(shard, from_end=is_from_end)

    def second(self, factor: float, min_age_s: float) -> Task | None:
        """Give out the oldest shard in hand once more, from its end, if it takes far longer than is usual.

        That is: `factor` times the median of the finished ones, and `min_age_s`. None while shards wait, before the
        first is finished, and for a shard that two workers have already.
        """
        alone = self._alone()
        if self._waiting or not self._durations or not alone:
            return None
        oldest = min(alone, key=lambda task: task.began)
        age = self._clock() - oldest.began
        if age <= max(min_age_s, factor * statistics.median(self._durations)):
            return None
        log.warning("shard %d: takes long, %.0f s so far; a second worker begins at its end", oldest.shard.index, age)
        return self._begin(oldest.shard, from_end=True)

    @property
    def num_alone(self) -> int:
        """Count the shards that a single worker makes, which might need a second one."""
        return len(self._alone())

    def made(self, task: Task) -> None:
        """Note that a task only has to be finished: no second worker could help."""
        self._made.add(task)

    def done(self, task: Task) -> list[Task] | None:
        """Take a result. Returns: the other tasks at the shard, which are in vain now; None if it has its result."""
        self._return(task)
        if task.shard.index in self._settled:
            return None
        self._durations.append(self._clock() - task.began)
        return self._settle(task.shard)

    def failed(self, task: Task, reason: str) -> ShardResult | None:
        """Take an error as answer. Returns: what becomes of the shard, if it is given up."""
        index = task.shard.index
        self._failures[index] += 1
        number = self._failures[index]
        self._return(task)
        if index not in self._settled and number >= self._max_attempts and not self._in_hand.get(index):
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

    def lost(self, task: Task, reason: str) -> ShardResult | None:
        """Take back the shard of a worker that died or was killed. Returns: see `failed`."""
        index = task.shard.index
        self._losses[index] += 1
        self._reasons[index] = reason
        number = self._losses[index]
        self._return(task)
        limit = self._max_attempts + LOSSES_PER_ROW * task.shard.num_rows
        if index not in self._settled and number >= limit and not self._in_hand.get(index):
            return self._give_up(task.shard, f"{number} workers were lost on it; the last: {reason}")
        if index not in self._settled:
            about = {"shard": index}
            log.warning("shard %d: %s (worker %d lost on it); another one goes on", index, reason, number, extra=about)
        self._wait(task.shard)
        return None

    def put_aside(self, task: Task) -> None:
        """Take a shard back that is unfinished through no fault of its own: it is the next."""
        self._return(task)
        self._wait(task.shard, is_next=True)

    def hand_over(self, task: Task) -> None:
        """Let another worker have a shard, from its end, while the one that leaves finishes what it has begun."""
        self._leaving.add(task)
        self._from_end.add(task.shard.index)
        self._wait(task.shard, is_next=True)

    def _begin(self, shard: Shard, *, from_end: bool) -> Task:
        index = shard.index
        attempt = Attempt(
            number=self._failures[index] + 1,
            lost=self._losses[index],
            reason=self._reasons.get(index, ""),
            from_end=from_end,
        )
        task = Task(shard, attempt, self._clock())
        self._in_hand.setdefault(index, []).append(task)
        return task

    def _return(self, task: Task) -> None:
        tasks = self._in_hand[task.shard.index]
        tasks.remove(task)
        if not tasks:
            del self._in_hand[task.shard.index]
        self._leaving.discard(task)
        self._made.discard(task)

    def _wait(self, shard: Shard, *, is_next: bool = False) -> None:
        """Queue a shard unless it is settled, or queued, or somebody works on it who stays."""
        has_worker = any(task not in self._leaving for task in self._in_hand.get(shard.index, ()))
        if shard.index in self._settled or has_worker or shard.index in self._back:
            return
        self._back.add(shard.index)
        if is_next:
            self._waiting.appendleft(shard)
        else:
            self._waiting.append(shard)

    def _settle(self, shard: Shard) -> list[Task]:
        self._settled.add(shard.index)
        if shard.index in self._back:
            self._back.remove(shard.index)
            self._waiting.remove(shard)
        for per_shard in (self._failures, self._losses, self._reasons):
            per_shard.pop(shard.index, None)
        return list(self._in_hand.get(shard.index, ()))

    def _give_up(self, shard: Shard, error: str) -> ShardResult:
        self._settle(shard)
        return ShardResult(shard=shard.index, error=error)

    def _alone(self) -> list[Task]:
        alone = (tasks[0] for tasks in self._in_hand.values() if len(tasks) == 1)
        return [task for task in alone if task not in self._made and task.shard.index not in self._settled]
