"""The engine on a Ray cluster: a pool of actors that the driver owns.

Each actor makes a shard while it finishes the previous one. The pool decides where shards run, and does not know their
contents. It gives the shard of a lost worker to another one, and replaces the process. Ray's own retries are off, since
they would tie a shard to its actor.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayActorError, RayError

from flux_batch.engine.backoff import FIRST_PAUSE_S, Backoff
from flux_batch.engine.failure import Failure
from flux_batch.engine.protocol import Cluster, WorkerFactory
from flux_batch.engine.ray_actor import make_actor_class
from flux_batch.engine.ray_cluster import RayCluster, connect, why_unreachable
from flux_batch.engine.ray_handle import Call, WorkerHandle, Workers
from flux_batch.engine.ray_local import joins_cluster
from flux_batch.engine.ray_metrics import PoolMetrics
from flux_batch.engine.shard_queue import ShardQueue, Task
from flux_batch.engine.stop import Stop
from flux_batch.errors import DiskFull, RunIncomplete
from flux_batch.records import Shard, ShardResult
from flux_batch.telemetry import EngineState

log = logging.getLogger(__name__)

# The longest wait for answers, in seconds; a stop request is noticed after it.
_POLL_S = 0.5
# Seconds between two checks of workers, nodes and cluster; a spot node gives at least 30 s of notice.
_CHECK_INTERVAL_S = 2.0
# Seconds between log lines about missing workers.
_WARN_AFTER_S = 30.0
# The number of workers that are asked for their figures at each check.
_ASKED_AT_ONCE = 64
# Workers that begin to load their model per second: a thousand at once would all request the weights at once.
STARTS_PER_S = 100
# At the end of a run, one idle worker per this many stays, to help with slow shards.
_WORKERS_PER_SPARE = 20


@dataclass(frozen=True)
class RayPool:
    """Runs shards on up to `max_workers` actors, started while there is work for them.

    A worker is killed after `hang_s` seconds without progress, or `load_hang_s` while it loads its model. Stopped
    workers have `drain_s` to put their shards aside. `outage_s` is the longest time that storage may be unavailable. At
    the end of a run, an idle worker also begins a shard that another one has had for longer than `slow_s` and
    `slow_factor` times the usual duration. `name` is the run's name in metrics. `runtime_env` is that of Ray, for
    workers that need packages of their own.
    """

    max_workers: int
    min_workers: int = 1
    num_gpus: float = 1
    num_cpus: float = 1
    max_attempts: int = 3
    hang_s: float = 900
    load_hang_s: float = 3600
    drain_s: float = 25
    outage_s: float = 1800
    backoff_s: float = FIRST_PAUSE_S
    slow_factor: float = 2
    slow_s: float = 30
    name: str = ""
    runtime_env: Mapping[str, Any] | None = None

    def run(
        self,
        factory: WorkerFactory,
        shards: Sequence[Shard],
        stop: Stop | None = None,
        state: EngineState | None = None,
    ) -> Iterator[ShardResult]:
        """Join the cluster of RAY_ADDRESS, or start one on this machine, and run every shard."""
        stop, state = stop or Stop(), state or EngineState()
        if stop.is_requested:
            return
        state.waiting_for = "the Ray cluster to answer" if joins_cluster() else "a local Ray cluster to start"
        connect(self.max_workers, self.num_gpus)
        cluster = RayCluster(make_actor_class(self.num_gpus, self.num_cpus, self.runtime_env), factory)
        pool = Pool(self, cluster, shards, stop, state, PoolMetrics(self.name).export)
        try:
            yield from pool.results()
        finally:
            if why_unreachable(cluster.address) is None:
                pool.end()


@dataclass
class Pool:
    """The state of one run: the workers and their tasks; `export` is called with the gauges.

    A turn of the loop costs the same with a thousand workers as with ten: it looks only at workers that have answered.
    """

    options: RayPool
    cluster: Cluster
    shards: Sequence[Shard]
    stop: Stop
    state: EngineState
    export: Callable[..., None]
    workers: Workers = field(default_factory=Workers)
    has_started: bool = False
    failed_starts: int = 0
    num_asked: int = 0  # workers asked for their figures in this round

    def __post_init__(self) -> None:
        self.queue = ShardQueue(self.shards, self.options.max_attempts, self.options.outage_s, self.cluster.clock)
        self.start_backoff = self._backoff()
        self.last_start = self.last_check = self.cluster.clock()

    def results(self) -> Iterator[ShardResult]:
        """Run the pool until every shard has its result, or until a stop is requested.

        Workers that still have a shard then may finish it or put it aside. They have `drain_s` seconds from that moment
        or from the stop request, whichever was earlier. Without a stop, these are workers whose shard another one has
        finished first. `end` kills the workers that are left.
        """
        while not self.queue.is_settled and not self.stop.is_requested:
            self._start_workers()
            self._scale_down()
            self._dispatch()
            yield from self._step()
            self._report_missing_workers()
        ended = self.cluster.clock()
        for worker in self.workers:
            if worker.tasks:
                self._stop(worker)
            else:
                self._remove(worker)
        while self.workers.num_with_tasks:
            left = self.options.drain_s - max(self.cluster.clock() - ended, self.stop.since_s)
            if left <= 0:
                return
            yield from self._step(min(_POLL_S, left))

    def end(self) -> None:
        """End every worker."""
        for worker in self.workers:
            self._remove(worker)
        self._export_metrics()  # once more, since gauges keep their last values

    def _start_workers(self) -> None:
        """Start workers, up to the number of shards that are left."""
        for worker in list(self.workers.closed):
            worker.start_again()
            self.workers.update(worker)
        num_wanted = min(self.options.max_workers, self.queue.num_waiting + len(self.workers.busy))
        if self.start_backoff.is_over:
            num_new = num_wanted - self.workers.num_staying
            for _ in range(num_new):
                after_s = random.uniform(0, (num_new - 1) / STARTS_PER_S)
                self.workers.add(WorkerHandle.start(self.cluster, self._backoff(), self.state.start(), after_s))

    def _scale_down(self) -> None:
        """End workers without work, so that their nodes can leave; keep a few for slow shards."""
        if self.queue.num_waiting:
            return
        num_spare = min(-(-self.options.max_workers // _WORKERS_PER_SPARE), self.queue.num_alone)
        if len(self.workers.empty) > num_spare:
            by_use = sorted(self.workers.empty, key=lambda worker: (not worker.is_up, worker.num_failed))
            for worker in by_use[num_spare:]:
                self._remove(worker)

    def _dispatch(self) -> None:
        """Assign shards to idle workers."""
        now = self.cluster.clock()
        self.workers.end_pauses(now)
        while worker := self._next_free():
            task = self.queue.next() or self.queue.speculate(self.options.slow_factor, self.options.slow_s)
            if task is None:
                return
            worker.make(task, now)
            self.state.begin(worker.seen, task.shard.index)
            self.workers.update(worker)

    def _next_free(self) -> WorkerHandle | None:
        """Return the worker that has been free longest; for an isolated shard, one without any other shard."""
        is_isolated = self.queue.is_next_isolated
        return next((worker for worker in self.workers.free if not (is_isolated and worker.finishing)), None)

    def _step(self, wait_s: float = _POLL_S) -> Iterator[ShardResult]:
        """Wait a little for answers and handle them; check all workers if it is time."""
        self.state.waiting_for = self._waits_for()
        for call in self.cluster.wait(wait_s):
            if worker := self.workers.with_call(call):  # None if the worker was lost with another call
                yield from self._on_answer(worker, call)
                self.workers.update(worker)
        yield from self._check()

    def _on_answer(self, worker: WorkerHandle, call: Call) -> Iterator[ShardResult]:
        """Handle the answer of a worker, or its loss."""
        try:
            outcome: ShardResult | Failure | None = call.result()
        except RayError as error:
            reason = "its worker died" if isinstance(error, RayActorError) else _first_line(error)
            yield from self._on_worker_lost(worker, reason, error)
            return
        if isinstance(outcome, Failure):
            log.debug("%s", outcome.details)
        task = worker.on_answer(call)
        if task is None:
            assert not isinstance(outcome, ShardResult)
            self._on_start(worker, outcome)
        elif outcome is None:
            self.queue.mark_made(task)
            worker.finish(task)
        else:
            yield from self._settle(worker, task, outcome)

    def _on_start(self, worker: WorkerHandle, failure: Failure | None) -> None:
        """Record that a worker has started or failed to. Raises: an error that every worker would meet."""
        if failure is None:
            worker.is_up = self.has_started = True
            worker.failure = None
            worker.backoff.reset()
            worker.seen.up_at = time.monotonic()
            self.failed_starts = 0
            self.last_start = self.cluster.clock()
            self.workers.update(worker)
            log.info("%d of %d workers up", len(self.workers.up), len(self.workers))
            return
        if failure.kind == "storage_unavailable":
            worker.failure = failure
            worker.backoff.begin()
            if isinstance(failure.error, DiskFull) and all(each.failure for each in self.workers):
                raise failure.error  # no worker can start
            self.queue.check_outage("a worker could not start", failure)
            return
        self._remove(worker)
        if failure.kind == "device_lost" or (self.has_started and failure.kind != "run_failed"):
            self._count_failed_start(worker, failure.message)  # the cause may be this node
        else:
            raise failure.error or RunIncomplete(f"a worker could not start: {failure.message}")

    def _settle(self, worker: WorkerHandle, task: Task, outcome: ShardResult | Failure) -> Iterator[ShardResult]:
        """Settle a task, yield its shard's result if any, and act on its worker."""
        outcome = self._judged(worker, outcome)
        result = self.queue.settle(task, outcome)
        worker.seen.end(task.shard.index)
        if result:
            self.state.settle(task.shard.index)
        if isinstance(outcome, ShardResult):
            self.start_backoff.reset()
            worker.backoff.reset()
        elif outcome.kind == "worker_failed":
            worker.backoff.begin()
        elif outcome.kind == "stopped":
            worker.is_stopping = True
        elif outcome.kind == "storage_unavailable":
            worker.backoff.begin()
        elif outcome.kind == "device_lost":
            self._remove(worker)
            for made in worker.tasks:  # the device was lost on another shard
                self.queue.requeue(made)
        if result:
            self._stop_duplicates(task)
            yield result
        if worker.is_stopping and not worker.tasks and worker in self.workers:
            self._remove(worker)

    def _judged(self, worker: WorkerHandle, outcome: ShardResult | Failure) -> ShardResult | Failure:
        """Return the outcome of a shard; blame the worker for a second failure in a row.

        Otherwise a node with a broken disk would fail all waiting shards, faster than others make them. The first
        failure counts against the shard. So do all failures while no other worker is promising; a worker that has been
        loading for longer than `hang_s` is not.
        """
        if isinstance(outcome, ShardResult):
            worker.num_failed = 0
            return outcome
        if outcome.kind != "shard_failed":
            return outcome
        worker.num_failed += 1
        now, load_s = self.cluster.clock(), self.options.hang_s
        if worker.num_failed == 1 or not any(other.is_promising(now, load_s) for other in self.workers):
            return outcome
        where = worker.seen.name or f"of node {worker.node[:8]}"
        log.warning("worker %s: %d shards in a row failed on it: %s", where, worker.num_failed, outcome.message)
        return replace(outcome, kind="worker_failed")

    def _stop_duplicates(self, task: Task) -> None:
        """Stop the workers that still make a shard which another one has finished."""
        for other in self.queue.pointless(task.shard.index):
            if worker := self.workers.with_task(other):
                self._stop(worker)

    def _on_worker_lost(self, worker: WorkerHandle, reason: str, error: BaseException | None) -> Iterator[ShardResult]:
        """Remove a worker that died or hangs; the loss counts against its shards unless its node left."""
        self.cluster.check()
        worker.update_node()
        self._remove(worker)  # kills it too: it may still run without contact to the driver
        left_with_node = self.cluster.caused_loss(worker.node, error)
        if left_with_node:
            log.warning("a worker left with its node%s", f" {worker.node[:8]}" if worker.node else "")
        elif not worker.tasks:
            self._count_failed_start(worker, _first_line(error) if error else reason)
        for task in worker.tasks:  # each is tried alone next, to find the one that killed the worker
            if left_with_node:
                self.queue.requeue(task)
            elif result := self.queue.lose(task, reason):
                yield result

    def _count_failed_start(self, lost: WorkerHandle, reason: str) -> None:
        """Count a worker that was lost while it started, and pause before the next start.

        Raises: RunIncomplete after too many in a row, if no other worker is up or starts on another node.
        """
        self.failed_starts += 1
        self.start_backoff.begin()
        log.warning("a worker was lost while it started: %s", reason)
        for worker in (lost, *self.workers):
            worker.update_node()
        is_elsewhere = lost.node and any(worker.node not in ("", lost.node) for worker in self.workers)
        if self.failed_starts > self.options.max_attempts and not (self.workers.up or is_elsewhere):
            raise RunIncomplete(f"{self.failed_starts} workers in a row died while they started; the last: {reason}")

    def _remove(self, worker: WorkerHandle) -> None:
        worker.kill()
        self.state.end(worker.seen)
        self.workers.remove(worker)

    def _stop(self, worker: WorkerHandle) -> None:
        worker.stop()
        self.workers.update(worker)

    def _backoff(self) -> Backoff:
        return Backoff(self.options.backoff_s, self.cluster.clock)

    def _check(self) -> Iterator[ShardResult]:
        """Check the cluster, drain workers of leaving nodes, and replace workers that hang."""
        now = self.cluster.clock()
        since_last_s, interval_s = now - self.last_check, min(_CHECK_INTERVAL_S, self.options.hang_s / 4)
        if since_last_s < interval_s:
            return
        self.cluster.check()
        self.last_check = now
        self._export_metrics()
        leaving = self.cluster.leaving_nodes()
        if self.cluster.node in leaving:
            self.stop.request("the node of the driver is about to leave")
        self._update_figures()
        for worker in self.workers:
            worker.update_node()
            if worker.node in leaving:
                self._drain(worker)
            if not (worker.tasks or worker.is_loading):
                continue
            if since_last_s > 10 * interval_s:  # the driver was suspended, not the worker
                worker.reset_timeout(now)
            elif reason := self._why_hung(worker, now):
                yield from self._on_worker_lost(worker, reason, None)

    def _why_hung(self, worker: WorkerHandle, now: float) -> str | None:
        """Return why a worker counts as hung; None if it does not."""
        if not worker.is_loading:
            return worker.why_hung(now, self.options.hang_s)
        reason = worker.why_hung(now, self.options.load_hang_s)
        return reason and f"{reason} while it loaded its model (failures.load_hang_s)"

    def _update_figures(self) -> None:
        """Ask the next workers for their figures; asking a thousand at once would block the driver."""
        asked = list(self.workers)[self.num_asked : self.num_asked + _ASKED_AT_ONCE]
        for worker in asked:
            worker.update_figures()
        self.num_asked = self.num_asked + len(asked) if len(asked) == _ASKED_AT_ONCE else 0

    def _export_metrics(self) -> None:
        self.export(
            shards_waiting=self.queue.num_waiting,
            shards_in_hand=sum(len(worker.tasks) for worker in self.workers),
            workers_up=len(self.workers.up),
            workers_wanted=len(self.workers),
        )

    def _drain(self, worker: WorkerHandle) -> None:
        """Stop a worker whose node is about to leave; another worker begins its shard at once."""
        if not worker.tasks:
            self._remove(worker)
        elif not worker.is_stopping:
            if worker.task:
                log.warning("shard %d: the node of its worker is about to leave", worker.task.shard.index)
                self.queue.hand_over(worker.task)
            self._stop(worker)

    def _waits_for(self) -> str:
        """Return a text on what the run waits for; empty once a worker is up."""
        if not self.workers or self.workers.up:
            return ""
        num_placed = sum(bool(worker.node) for worker in self.workers)
        if not num_placed:
            return f"{_workers(len(self.workers))} to start"
        return f"the model to load in {_workers(num_placed)}" + (
            f", and {_workers(len(self.workers) - num_placed)} to start" if num_placed < len(self.workers) else ""
        )

    def _report_missing_workers(self) -> None:
        """Log what the run waits for if workers do not start."""
        num_up = len(self.workers.up)
        if num_up >= self.options.min_workers or num_up == len(self.workers):
            return
        if self.cluster.clock() - self.last_start > _WARN_AFTER_S:
            self.last_start = self.cluster.clock()
            num_without = sum(not worker.node for worker in self.workers)
            if num_without:
                resources = self.cluster.resources()
                log.warning(
                    "%d of %d workers wait for a node: each needs %g GPU, %g CPU; the cluster has %g GPU, %g CPU%s",
                    num_without,
                    len(self.workers),
                    self.options.num_gpus,
                    self.options.num_cpus,
                    resources.get("GPU", 0),
                    resources.get("CPU", 0),
                    "; Ray may still be installing their runtime_env" if self.options.runtime_env else "",
                )
            if num_loading := len(self.workers) - num_without - num_up:
                log.info("%d of %d workers load the model", num_loading, len(self.workers))


def _workers(number: int) -> str:
    return f"{number} worker{'' if number == 1 else 's'}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
