"""One worker of the pool as the driver sees it: an actor, its unanswered calls, and whether it still responds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from flux_batch.engine.backoff import Backoff
from flux_batch.engine.ray_actor import FINISH, WATCH, WorkerActor
from flux_batch.engine.shard_queue import Task
from flux_batch.telemetry import WorkerState

# Shards that a worker may be finishing when it begins another: this bounds its disk usage.
_MAX_FINISHING = 1
# Seconds that a process may take to answer how long it has been idle.
PING_TIMEOUT_S = 60.0


@dataclass(eq=False)
class WorkerHandle:
    """An actor that starts, or that makes one task and finishes others.

    `call` is the unanswered call that starts the worker or makes `task`; `finishing` has those that finish tasks.
    """

    actor: Any
    call: Any | None
    backoff: Backoff
    seen: WorkerState
    task: Task | None = None
    finishing: dict[Any, Task] = field(default_factory=dict)
    is_up: bool = False
    is_stopping: bool = False  # stays so: a stopped worker takes no other shard
    node: str = ""  # known soon after its process has started
    _node_call: Any | None = None
    _ping: Any | None = None
    _pinged: float = field(default=0.0)
    _figures: Any | None = None

    @property
    def is_idle(self) -> bool:
        """True if it can take a shard."""
        is_free = self.task is None and len(self.finishing) <= _MAX_FINISHING
        is_free &= not any(task.attempt.lost for task in self.finishing.values())
        return self.is_up and is_free and not self.is_stopping and self.backoff.is_over

    @property
    def tasks(self) -> list[Task]:
        """The tasks that would be lost with the worker."""
        return [*self.finishing.values(), *([self.task] if self.task else [])]

    def make(self, task: Task, now: float) -> None:
        """Begin to make a shard."""
        self.task, self._ping, self._pinged = task, None, now
        self.call = self.actor.make.remote(task.shard, task.attempt)

    def finish(self, task: Task) -> None:
        """Begin to finish a shard that was made; another one can be made meanwhile."""
        self.finishing[self.actor.finish.remote(task.shard.index)] = task

    def on_answer(self, call: Any) -> Task | None:
        """Record that a call is answered. Returns: its task, None if the call started the worker."""
        if call != self.call:
            return self.finishing.pop(call)
        task, self.task, self.call = self.task, None, None
        return task

    def stop(self) -> None:
        """Request that it puts its current shard aside, and give it no other."""
        if not self.is_stopping:
            self.is_stopping = True
            self.actor.stop.remote()

    def reset_timeout(self, now: float) -> None:
        """Restart its time to answer, since the driver itself was suspended."""
        self._pinged = now

    def why_hung(self, now: float, hang_s: float) -> str | None:
        """Ping the actor now and then. Returns: the reason to count it as hung, None while there is none."""
        if self._ping is None:
            if now - self._pinged >= min(hang_s / 4, PING_TIMEOUT_S / 4):
                self._ping, self._pinged = self.actor.idle_s.remote(), now
            return None
        idle_s, self._ping = _answer(self._ping)
        if self._ping is not None:
            silent_s = now - self._pinged
            return f"its process did not answer for {silent_s:.0f} s" if silent_s > PING_TIMEOUT_S else None
        return f"no progress for {idle_s:.0f} s" if idle_s is not None and idle_s > hang_s else None

    def update_node(self) -> None:
        """Read the id of its node, if it has answered with it."""
        if self._node_call is not None:
            node, self._node_call = _answer(self._node_call)
            self.node = node or ""
            if self.node:
                self.seen.placed_at = time.monotonic()

    def update_figures(self) -> None:
        """Read its figures if it has answered with them, and ask again."""
        if self._figures is not None:
            answer, self._figures = _answer(self._figures)
            if answer is not None:
                self.seen.name, figures = answer
                self.seen.update(figures)
        if self._figures is None and self.is_up:
            self._figures = self.actor.figures.remote()

    def kill(self) -> None:
        """End its process at once."""
        ray.kill(self.actor)


def make_actor_class(num_gpus: float, num_cpus: float, runtime_env: Mapping[str, Any] | None = None) -> Any:
    """Return the Ray class of the actors of a pool. Ray stores it in the cluster, so it is made once."""
    return ray.remote(
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={WATCH: 1, FINISH: 1},
        # Task events of a long run would fill the memory of the head node.
        enable_task_events=False,
        runtime_env=dict(runtime_env) if runtime_env else None,
    )(WorkerActor)


def start_worker(actor_class: Any, factory: Any, backoff: Backoff, seen: WorkerState) -> WorkerHandle:
    """Start one more worker. If the cluster has no room for it, this makes the autoscaler add a node."""
    actor = actor_class.remote(factory)
    return WorkerHandle(actor, actor.open.remote(), backoff, seen, _node_call=actor.node_id.remote())


def wait_for_answers(workers: Iterable[WorkerHandle], timeout_s: float) -> list[tuple[WorkerHandle, Any]]:
    """Wait until a worker has answered a call. Returns: the workers that have, with the calls."""
    calls = {call: worker for worker in workers for call in (worker.call, *worker.finishing) if call is not None}
    answered, _ = ray.wait(list(calls), timeout=timeout_s) if calls else ([], [])
    return [(calls[call], call) for call in answered]


def _answer(call: Any) -> tuple[Any, Any | None]:
    """Return the answer to a call, and the call itself if it has none yet."""
    if not ray.wait([call], timeout=0)[0]:
        return None, call
    try:
        return ray.get(call), None
    except RayError:  # the actor is gone, which its main call reports with the reason
        return None, None
