"""The workers of a pool as the driver sees them: actors, unanswered calls, signs of life."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from flux_batch.engine.backoff import Backoff
from flux_batch.engine.failure import Failure
from flux_batch.engine.protocol import Cluster
from flux_batch.engine.shard_queue import Task
from flux_batch.telemetry import WorkerState

# Shards that a worker may still be finishing when it begins another; this limits its disk usage.
_MAX_FINISHING = 1
# Seconds in which a process must answer a ping.
PING_TIMEOUT_S = 60.0

Call = Future[Any]


@dataclass(eq=False)
class WorkerHandle:
    """An actor that starts, or that makes one task and finishes others.

    `call` is the unanswered call that starts the worker or makes `task`; `finishing` holds the calls that finish tasks.
    """

    cluster: Cluster
    actor: Any
    backoff: Backoff
    seen: WorkerState
    call: Call | None = None
    task: Task | None = None
    finishing: dict[Call, Task] = field(default_factory=dict)
    is_up: bool = False
    failure: Failure | None = None  # of its last start, which is retried after a pause
    num_failed: int = 0  # shards that failed on it since it last finished one
    is_stopping: bool = False  # never reset: a stopped worker takes no other shard
    node: str = ""  # known soon after its process has started
    _node_call: Call | None = None
    _placed: float = 0.0
    _ping: Call | None = None
    _pinged: float = field(default=0.0)
    _figures: Call | None = None

    @classmethod
    def start(cls, cluster: Cluster, backoff: Backoff, seen: WorkerState, after_s: float) -> WorkerHandle:
        """Start one more worker; it loads its model `after_s` seconds after its process has begun.

        If the cluster has no room for it, the autoscaler adds a node.
        """
        actor = cluster.start_actor()
        call = cluster.call(actor.open, after_s)
        return cls(cluster, actor, backoff, seen, call, _node_call=cluster.ask(actor.node_id))

    def start_again(self) -> None:
        """Load the model again in the same process, which keeps its place in the cluster."""
        self.call = self.cluster.call(self.actor.open, 0.0)

    @property
    def is_closed(self) -> bool:
        """True if it could not load its model and is not loading now."""
        return self.failure is not None and self.call is None

    @property
    def is_free(self) -> bool:
        """True if it can take a shard; it may still be pausing."""
        is_free = self.task is None and len(self.finishing) <= _MAX_FINISHING
        is_free &= not any(task.attempt.lost for task in self.finishing.values())
        return self.is_up and is_free and not self.is_stopping

    @property
    def is_loading(self) -> bool:
        """True if its process loads the model."""
        return bool(self.node) and not self.is_up and self.call is not None

    def is_promising(self, now: float, load_s: float) -> bool:
        """Return whether it works, or has been loading for less than `load_s`; never after a failed shard."""
        is_soon_up = self.is_loading and self.failure is None and now - self._placed < load_s
        return not self.num_failed and (self.task is not None or is_soon_up)

    @property
    def tasks(self) -> list[Task]:
        """The tasks that would be lost with the worker."""
        return [*self.finishing.values(), *([self.task] if self.task else [])]

    @property
    def calls(self) -> list[Call]:
        """The unanswered calls that start it, make a shard or finish one."""
        return [*self.finishing, *([self.call] if self.call else [])]

    def make(self, task: Task, now: float) -> None:
        """Begin to make a shard."""
        self.task, self._ping, self._pinged = task, None, now
        self.call = self.cluster.call(self.actor.make, task.shard, task.attempt)

    def finish(self, task: Task) -> None:
        """Begin to finish a made shard; another one can be made meanwhile."""
        self.finishing[self.cluster.call(self.actor.finish, task.shard.index)] = task

    def on_answer(self, call: Call) -> Task | None:
        """Record that a call is answered. Returns: its task, None if the call started the worker."""
        if call is not self.call:
            return self.finishing.pop(call)
        task, self.task, self.call = self.task, None, None
        return task

    def stop(self) -> None:
        """Request that it puts its current shard aside; it gets no other."""
        if not self.is_stopping:
            self.is_stopping = True
            self.cluster.ask(self.actor.stop)

    def reset_timeout(self, now: float) -> None:
        """Restart its timeout, since the driver itself was suspended."""
        self._pinged = now

    def why_hung(self, now: float, hang_s: float) -> str | None:
        """Ping the actor if it is time. Returns: why it counts as hung, None if it does not.

        While a model is loaded, a library may block the whole process, so an answer may then take `hang_s`.
        """
        if self._ping is None:
            if now - self._pinged >= min(hang_s / 4, PING_TIMEOUT_S / 4):
                self._ping, self._pinged = self.cluster.ask(self.actor.idle_s), now
            return None
        idle_s, self._ping = _answer(self._ping)
        if self._ping is not None:
            silent_s, limit_s = now - self._pinged, hang_s if self.is_loading else PING_TIMEOUT_S
            return f"its process did not answer for {silent_s:.0f} s" if silent_s > limit_s else None
        return f"no progress for {idle_s:.0f} s" if idle_s is not None and idle_s > hang_s else None

    def update_node(self) -> None:
        """Read the id of its node, if the answer is there."""
        if self._node_call is not None:
            node, self._node_call = _answer(self._node_call)
            self.node = node or ""
            if self.node:
                self.seen.placed_at, self._placed = time.monotonic(), self.cluster.clock()

    def update_figures(self) -> None:
        """Read its figures if the answer is there, and ask again."""
        if self._figures is not None:
            answer, self._figures = _answer(self._figures)
            if answer is not None:
                self.seen.name, figures = answer
                self.seen.update(figures)
        if self._figures is None and self.is_up:
            self._figures = self.cluster.ask(self.actor.figures)

    def kill(self) -> None:
        """End its process at once."""
        self.cluster.kill(self.actor)


class Workers:
    """The workers of a pool in groups by state: the driver need not look at all of them.

    `update` must follow every change of a worker. Each group is in the order in which its workers joined it.
    """

    def __init__(self) -> None:
        self._all: OrderedDict[WorkerHandle, None] = OrderedDict()
        self._of_call: dict[Call, WorkerHandle] = {}
        self._of_task: dict[Task, WorkerHandle] = {}  # only while the task is made
        self._known: dict[WorkerHandle, tuple[list[Call], Task | None]] = {}
        self.up: OrderedDict[WorkerHandle, None] = OrderedDict()
        self.stopping: OrderedDict[WorkerHandle, None] = OrderedDict()
        # Workers that make a shard and are not stopping.
        self.busy: OrderedDict[WorkerHandle, None] = OrderedDict()
        # Workers without any shard, to make or to finish.
        self.empty: OrderedDict[WorkerHandle, None] = OrderedDict()
        # Workers that are ready for a shard; pausing ones join after their pause.
        self.free: OrderedDict[WorkerHandle, None] = OrderedDict()
        # Workers to be started again; pausing ones join after their pause.
        self.closed: OrderedDict[WorkerHandle, None] = OrderedDict()
        self._pausing: list[tuple[float, int, WorkerHandle]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[WorkerHandle]:
        return iter(list(self._all))

    def __contains__(self, worker: object) -> bool:
        return worker in self._all

    @property
    def num_staying(self) -> int:
        """The number of workers that are not stopping."""
        return len(self._all) - len(self.stopping)

    @property
    def num_with_tasks(self) -> int:
        """The number of workers with a shard to make or to finish."""
        return len(self._all) - len(self.empty)

    def with_call(self, call: Call) -> WorkerHandle | None:
        """Return the worker of a call; None if it was removed."""
        return self._of_call.get(call)

    def with_task(self, task: Task) -> WorkerHandle | None:
        """Return the worker that makes a task; None if none does."""
        return self._of_task.get(task)

    def add(self, worker: WorkerHandle) -> None:
        """Add a worker."""
        self._all[worker] = None
        self.update(worker)

    def remove(self, worker: WorkerHandle) -> None:
        """Remove a worker."""
        del self._all[worker]
        self._forget(worker)
        for group in (self.up, self.stopping, self.busy, self.empty, self.free, self.closed):
            group.pop(worker, None)

    def update(self, worker: WorkerHandle) -> None:
        """Put a worker into the groups of its present state."""
        if worker not in self._all:
            return
        self._forget(worker)
        calls, task = self._known[worker] = (worker.calls, worker.task)
        self._of_call.update(dict.fromkeys(calls, worker))
        if task:
            self._of_task[task] = worker
        is_pausing = (worker.is_free or worker.is_closed) and not worker.backoff.is_over
        if is_pausing:
            self._number += 1
            heappush(self._pausing, (worker.backoff.until, self._number, worker))
        for group, is_in in (
            (self.up, worker.is_up),
            (self.stopping, worker.is_stopping),
            (self.busy, task is not None and not worker.is_stopping),
            (self.empty, task is None and not worker.finishing),
            (self.free, worker.is_free and not is_pausing),
            (self.closed, worker.is_closed and not is_pausing),
        ):
            if is_in:
                group.setdefault(worker)
            else:
                group.pop(worker, None)

    def end_pauses(self, now: float) -> None:
        """Update the groups of workers whose pauses are over."""
        while self._pausing and self._pausing[0][0] <= now:
            self.update(heappop(self._pausing)[2])

    def _forget(self, worker: WorkerHandle) -> None:
        calls, task = self._known.pop(worker, ([], None))
        for call in calls:
            del self._of_call[call]
        if task:
            del self._of_task[task]


def _answer(call: Call) -> tuple[Any, Call | None]:
    """Return the answer to a call, and the call itself if it has none yet."""
    if not call.done():
        return None, call
    # The main call of a lost actor reports the loss with its reason.
    return (None if call.exception() else call.result()), None
