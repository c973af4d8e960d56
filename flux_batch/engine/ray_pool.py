"""The engine on a Ray cluster: a pool of actors that the driver owns; each makes a shard while it finishes the last.

Decides where shards run; does not know what they are. A worker that is lost gives its shard to another one, and the
pool replaces the process. Ray's own retries are off, since they would pin a shard to its actor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from flux_batch.engine.backoff import FIRST_REST_S, Outage, Rest
from flux_batch.engine.protocol import Runner
from flux_batch.engine.ray_actor import Failure
from flux_batch.engine.ray_cluster import await_cluster, connect, gcs_address, why_unreachable
from flux_batch.engine.ray_handle import Member, actor_class, hire, wait
from flux_batch.engine.ray_metrics import PoolMetrics
from flux_batch.engine.ray_nodes import Nodes
from flux_batch.engine.shard_queue import ShardQueue, Task
from flux_batch.engine.stop import Stop
from flux_batch.errors import RunIncomplete
from flux_batch.records import Shard, ShardResult

log = logging.getLogger(__name__)

# How long one wait for answers lasts: how soon a request to stop is seen.
PULSE_S = 0.5
# How often to look after workers, nodes and the cluster; a spot notice gives 30 s at the least.
LOOK_S = 2.0
# Say so when workers that were asked for do not come: after this long, and then again.
PATIENCE_S = 30.0
# Of how many workers one may wait at the end for a shard that takes too long elsewhere.
WORKERS_PER_SPARE = 20


@dataclass(frozen=True)
class RayPool:
    """Runs shards on up to `max_workers` actors, started as long as there is work for them.

    `hang_s` without a sign of life ends a worker; `drain_s` is what workers have to put their shards aside; `outage_s`
    how long storage may fail. At the end, an idle worker also begins a shard that another one has had for `slow_factor`
    times the usual, and for `slow_s` seconds. `name` is that of the run, in metrics.
    """

    max_workers: int
    min_workers: int = 1
    num_gpus: float = 1
    num_cpus: float = 1
    max_attempts: int = 3
    hang_s: float = 900
    drain_s: float = 25
    outage_s: float = 1800
    rest_s: float = FIRST_REST_S
    slow_factor: float = 2
    slow_s: float = 30
    name: str = ""

    def run(self, runner: Runner, shards: Sequence[Shard], stop: Stop | None = None) -> Iterator[ShardResult]:
        """Join the cluster of RAY_ADDRESS, or start one on this machine, and run every shard."""
        stop = stop or Stop()
        if stop.is_requested:
            return
        connect(self.max_workers, self.num_gpus)
        pool = _Pool(self, ray.put(runner), ShardQueue(shards, self.max_attempts), stop, gcs_address(), Nodes())
        try:
            yield from pool.results()
        finally:
            if why_unreachable(pool.gcs_address) is None:
                pool.end()


@dataclass
class _Pool:
    """The state of one run: which workers exist and what each is doing."""

    options: RayPool
    runner: Any  # ObjectRef of the runner, stored once for all actors
    queue: ShardQueue
    stop: Stop
    gcs_address: str
    nodes: Nodes
    members: list[Member] = field(default_factory=list)
    has_started: bool = False
    failed_starts: int = 0
    last_start: float = field(default_factory=time.monotonic)
    last_look: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.actor_class = actor_class(self.options.num_gpus, self.options.num_cpus)
        self.outage = Outage(self.options.outage_s)
        self.rest = Rest(self.options.rest_s)  # of the pool, from starting workers
        self.metrics = PoolMetrics(self.options.name)

    def results(self) -> Iterator[ShardResult]:
        """Turn the crank until every shard has its result, or somebody asks to stop; then see the workers off."""
        while not self.queue.is_settled and not self.stop.is_requested:
            self._hire()
            self._let_go()
            self._dispatch()
            yield from self._turn()
            self._report_missing_workers()
        for member in list(self.members):
            if member.tasks:
                member.halt()
            else:
                self._remove(member)
        deadline = time.monotonic() + self.options.drain_s
        while self._busy() and time.monotonic() < deadline:
            yield from self._turn()

    def end(self) -> None:
        """End every worker."""
        for member in self.members:
            member.kill()
        self.members = []
        self._tell()  # levels stay where they were left

    def _busy(self) -> list[Member]:
        return [member for member in self.members if member.tasks]

    def _hire(self) -> None:
        """Have as many workers as there is work for."""
        staying = [member for member in self.members if not member.is_leaving]
        num_busy = sum(member.task is not None for member in staying)
        wanted = min(self.options.max_workers, self.queue.num_waiting + num_busy)
        if self.rest.is_over:
            for _ in range(wanted - len(staying)):
                self.members.append(hire(self.actor_class, self.runner, Rest(self.options.rest_s)))

    def _let_go(self) -> None:
        """End workers for which nothing is left, so that their nodes can go, but for a few that may help the others."""
        if self.queue.num_waiting:
            return
        idle = [member for member in self.members if not member.tasks]
        idle.sort(key=lambda member: member.is_up, reverse=True)
        num_spare = min(-(-self.options.max_workers // WORKERS_PER_SPARE), self.queue.num_alone)
        for member in idle[num_spare:]:
            self._remove(member)

    def _dispatch(self) -> None:
        for member in self.members:
            if member.is_idle and not (member.finishing and self.queue.is_next_suspect):
                task = self.queue.next() or self.queue.second(self.options.slow_factor, self.options.slow_s)
                if task is None:
                    return
                member.give(task, time.monotonic())

    def _turn(self) -> Iterator[ShardResult]:
        """Wait a little for answers and settle them; look after everybody now and then."""
        answered = wait(self.members, PULSE_S)
        for member, call in answered:
            if member in self.members:  # else it was lost with its other call
                yield from self._settle(member, call)
        if not answered and not any(member.call or member.finishing for member in self.members):
            time.sleep(PULSE_S)  # all rest
        yield from self._look()

    def _settle(self, member: Member, call: Any) -> Iterator[ShardResult]:
        """Take the answer of a worker, or its loss."""
        try:
            outcome: ShardResult | Failure | None = ray.get(call)
        except RayError as error:
            reason = "its worker died" if isinstance(error, RayActorError) else _first_line(error)
            yield from self._lose(member, reason, error)
            return
        if isinstance(outcome, Failure):
            log.debug("%s", outcome.details)
            if outcome.kind == "fatal" and outcome.error:
                raise outcome.error
        task = member.answered(call)
        if task is None:
            self._settle_start(member, outcome)
            return
        if outcome is None:
            self.queue.made(task)
            member.finish(task)
            return
        yield from self._settle_task(member, task, outcome)
        if member.is_leaving and not member.tasks and member in self.members:
            self._remove(member)

    def _settle_start(self, member: Member, outcome: Any) -> None:
        """Take a worker that is up into the pool; what none could do from the beginning ends the run."""
        if outcome is None:
            member.is_up = self.has_started = True
            self.failed_starts = 0
            self.last_start = time.monotonic()
            log.info("%d worker(s) up", sum(member.is_up for member in self.members))
            return
        self._remove(member)
        if outcome.kind == "outage":
            self.outage.meet("a worker could not start", outcome.message)
            self.rest.begin()
        elif outcome.kind == "lost" or self.has_started:  # this node may be to blame
            self._count_failed_start(outcome.message)
        else:
            raise outcome.error or RunIncomplete(f"a worker could not start: {outcome.message}")

    def _settle_task(self, member: Member, task: Task, outcome: Any) -> Iterator[ShardResult]:
        """Yield the result of a shard, or let it be tried again."""
        given_up = None
        if isinstance(outcome, ShardResult):
            self.outage.end()
            self.rest.reset()
            member.rest.reset()
            in_vain = self.queue.done(task)
            for other in self.members:
                if in_vain and other.task in in_vain:
                    other.halt()
            if in_vain is not None:
                yield outcome
        elif outcome.kind == "stopped":
            self.queue.put_aside(task)
            member.is_leaving = True
        elif outcome.kind == "outage":
            self.queue.put_aside(task)
            self.outage.meet(f"shard {task.shard.index}", outcome.message)
            member.rest.begin()
        elif outcome.kind == "lost":
            self._remove(member)
            given_up = self.queue.lost(task, outcome.message)
            for made in member.tasks:  # which is no fault of theirs
                self.queue.put_aside(made)
        else:
            given_up = self.queue.failed(task, outcome.message)
        if given_up:
            yield given_up

    def _lose(self, member: Member, reason: str, error: BaseException | None) -> Iterator[ShardResult]:
        """Replace a worker that is gone, or good for nothing; the shard pays for it only if its node did not leave."""
        await_cluster(self.gcs_address)
        member.find()
        self._remove(member)  # it may live on, cut off from us
        with_node = self.nodes.took(member.node, error)
        if with_node:
            log.warning("a worker left with its node%s", f" {member.node[:8]}" if member.node else "")
        if not member.tasks and not with_node:
            self._count_failed_start(_first_line(error) if error else reason)
        for task in member.tasks:  # which of them killed it shows when each is tried alone
            if with_node:
                self.queue.put_aside(task)
            elif given_up := self.queue.lost(task, reason):
                yield given_up

    def _count_failed_start(self, reason: str) -> None:
        self.failed_starts += 1
        log.warning("a worker was lost while it started: %s", reason)
        if self.failed_starts > self.options.max_attempts:
            raise RunIncomplete(f"{self.failed_starts} workers in a row died while they started; the last: {reason}")

    def _remove(self, member: Member) -> None:
        member.kill()
        self.members.remove(member)

    def _look(self) -> Iterator[ShardResult]:
        """See which nodes leave, who hangs, and whether the cluster is still there."""
        now = time.monotonic()
        away, look_s = now - self.last_look, min(LOOK_S, self.options.hang_s / 4)
        if away < look_s:
            return
        await_cluster(self.gcs_address)
        self.last_look = now
        self._tell()
        self.nodes.look()
        if self.nodes.here in self.nodes.leaving:
            self.stop.request("the node of the driver is about to leave")
        for member in list(self.members):
            member.find()
            if member.node in self.nodes.leaving:
                self._send_away(member)
            if not member.tasks:
                continue
            if away > 10 * look_s:
                member.forgive(now)
            elif silence := member.silence(now, self.options.hang_s):
                yield from self._lose(member, silence, None)

    def _tell(self) -> None:
        self.metrics.tell(
            shards_waiting=self.queue.num_waiting,
            shards_in_hand=sum(len(member.tasks) for member in self.members),
            workers_up=sum(member.is_up for member in self.members),
            workers_wanted=len(self.members),
        )

    def _send_away(self, member: Member) -> None:
        """Take a worker off a node that is about to leave; another one begins its shard at once."""
        if not member.tasks:
            self._remove(member)
        elif not member.is_leaving:
            if member.task:
                log.warning("shard %d: the node of its worker is about to leave", member.task.shard.index)
                self.queue.hand_over(member.task)
            member.halt()

    def _report_missing_workers(self) -> None:
        """Say what the run is waiting for, when workers do not come."""
        num_up = sum(member.is_up for member in self.members)
        if num_up >= self.options.min_workers or num_up == len(self.members):
            return
        if time.monotonic() - self.last_start > PATIENCE_S:
            self.last_start = time.monotonic()
            log.warning(
                "%d of %d workers are up; waiting for %d, each with %g GPU and %g CPU (the cluster has %g GPU, %g CPU)",
                num_up,
                self.options.min_workers,
                len(self.members) - num_up,
                self.options.num_gpus,
                self.options.num_cpus,
                ray.cluster_resources().get("GPU", 0),
                ray.cluster_resources().get("CPU", 0),
            )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
