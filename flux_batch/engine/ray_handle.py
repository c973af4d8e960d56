"""One worker of the pool as the driver sees it: an actor, what it was last asked, and whether it still answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from flux_batch.engine.backoff import Rest
from flux_batch.engine.ray_actor import FINISH, WATCH, RayWorker
from flux_batch.engine.shard_queue import Task

# Shards that may be on their way to their commits when a worker begins another: a bound on its disk.
MOST_FINISHING = 1
# A process that does not even say how it is for so long is not alive in any useful way.
ANSWER_S = 60.0


@dataclass(eq=False)
class Member:
    """An actor that starts, or makes a task and finishes others.

    `call` is the answer it owes about its start or the task that it makes, `finishing` those about tasks that are made.
    """

    actor: Any
    call: Any | None
    rest: Rest
    task: Task | None = None
    finishing: dict[Any, Task] = field(default_factory=dict)
    is_up: bool = False
    is_leaving: bool = False  # it was told to stop, which is for good
    node: str = ""  # known soon after its process is there
    _place: Any | None = None
    _sign: Any | None = None  # the answer to how long it has been quiet
    _asked: float = field(default=0.0)

    @property
    def is_idle(self) -> bool:
        """Whether it can take a shard."""
        is_free = self.task is None and len(self.finishing) <= MOST_FINISHING
        is_free &= not any(task.attempt.lost for task in self.finishing.values())
        return self.is_up and is_free and not self.is_leaving and self.rest.is_over

    @property
    def tasks(self) -> list[Task]:
        """All that would be lost with it."""
        return [*self.finishing.values(), *([self.task] if self.task else [])]

    def give(self, task: Task, now: float) -> None:
        """Have a shard made."""
        self.task, self._sign, self._asked = task, None, now
        self.call = self.actor.make.remote(task.shard, task.attempt)

    def answered(self, call: Any) -> Task | None:
        """Take note that a call is answered. Returns: the task that it was about, None if it was the start."""
        if call != self.call:
            return self.finishing.pop(call)
        task, self.task, self.call = self.task, None, None
        return task

    def finish(self, task: Task) -> None:
        """Have the shard that was made finished; the next one may be given meanwhile."""
        self.finishing[self.actor.finish.remote(task.shard.index)] = task

    def halt(self) -> None:
        """Have it put aside what it has in hand."""
        if not self.is_leaving:
            self.is_leaving = True
            self.actor.stop.remote()

    def forgive(self, now: float) -> None:
        """Let its time to answer begin anew, since it was the driver that was away."""
        self._asked = now

    def silence(self, now: float, hang_s: float) -> str | None:
        """Ask for signs of life. Returns: None, or what speaks against it."""
        if self._sign is None:
            if now - self._asked >= min(hang_s / 4, ANSWER_S / 4):
                self._sign, self._asked = self.actor.idle_s.remote(), now
            return None
        idle_s, self._sign = _answer(self._sign)
        if self._sign is not None:
            return f"its process did not answer for {now - self._asked:.0f} s" if now - self._asked > ANSWER_S else None
        return f"no sign of life for {idle_s:.0f} s" if idle_s is not None and idle_s > hang_s else None

    def find(self) -> None:
        """Learn where it is, if it has said so."""
        if self._place is not None:
            node, self._place = _answer(self._place)
            self.node = node or ""

    def kill(self) -> None:
        """End its process at once."""
        ray.kill(self.actor)


def actor_class(num_gpus: float, num_cpus: float) -> Any:
    """Make the class of all actors of a pool; Ray keeps it in the cluster, so once is enough."""
    return ray.remote(
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={WATCH: 1, FINISH: 1},
        # Task events of a long run would fill the memory of the cluster's head.
        enable_task_events=False,
    )(RayWorker)


def hire(actor_class: Any, runner: Any, rest: Rest) -> Member:
    """Ask the cluster for one more worker; where there is no room yet, this tells the autoscaler to make some."""
    actor = actor_class.remote(runner)
    return Member(actor, actor.open.remote(), rest, _place=actor.node_id.remote())


def wait(members: Iterable[Member], timeout_s: float) -> list[tuple[Member, Any]]:
    """Wait until some member has answered what it was called for. Returns: each with that call."""
    calls = {call: member for member in members for call in (member.call, *member.finishing) if call is not None}
    answered, _ = ray.wait(list(calls), timeout=timeout_s) if calls else ([], [])
    return [(calls[call], call) for call in answered]


def _answer(call: Any) -> tuple[Any, Any | None]:
    """Look whether a call is answered. Returns: the answer, and the call if there is none yet."""
    if not ray.wait([call], timeout=0)[0]:
        return None, call
    try:
        return ray.get(call), None
    except RayError:  # it is gone, as its main call will tell with the reason
        return None, None
