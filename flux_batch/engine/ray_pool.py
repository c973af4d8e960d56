"""The engine on a Ray cluster: a pool of actors that the driver owns, one shard in flight on each.

Decides where shards run; does not know what they are. A lost worker costs its shard one attempt; the shard goes to
another worker and the pool replaces the process. Ray's own retries are off, since they would pin a shard to its actor.
"""

from __future__ import annotations

import glob
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from flux_batch.engine.protocol import Runner
from flux_batch.engine.ray_actor import Failure, RayWorker
from flux_batch.errors import Interrupted, RunIncomplete
from flux_batch.records import Shard, ShardResult

log = logging.getLogger(__name__)

# How long one wait for answers lasts: the pulse of the log lines about missing workers.
PULSE_S = 5.0
# Say so when workers that were asked for do not come: after this long, and then again.
PATIENCE_S = 30.0
# How long to wait for the TCP answer of a cluster that others have started.
REACHABLE_S = 10.0
# How long a cluster that stopped answering may take to come back.
LOST_S = 30.0


@dataclass(frozen=True)
class RayPool:
    """Runs shards on up to `max_workers` actors, started as long as there is work for them."""

    max_workers: int
    min_workers: int = 1
    num_gpus: float = 1
    num_cpus: float = 1
    max_attempts: int = 3

    def run(self, runner: Runner, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Join the cluster of RAY_ADDRESS, or start one on this machine, and run every shard."""
        connect(self.max_workers, self.num_gpus)
        pool = _Pool(self, ray.put(runner), deque(shards), ray.get_runtime_context().gcs_address)
        try:
            yield from pool.results()
        finally:
            if why_unreachable(pool.gcs_address) is None:
                pool.stop()


def connect(max_workers: int, num_gpus: float) -> None:
    """Connect to Ray unless this process already is; a local cluster on a machine without GPUs gets logical ones.

    Raises: Interrupted if no cluster answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address := os.environ.get("RAY_ADDRESS"):
        check_reachable(address)
    else:
        options |= {"address": "local", "include_dashboard": False}
        if not glob.glob("/dev/nvidia[0-9]*"):
            options["num_gpus"] = max_workers * num_gpus
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init takes the signal over; it is the program's to handle


def check_reachable(address: str) -> None:
    """Raise Interrupted unless something listens at a HOST:PORT address; Ray itself would try for many minutes."""
    if reason := why_unreachable(address):
        raise Interrupted(
            f"RAY_ADDRESS = {address}: no Ray cluster answers there ({reason}); start it, or unset RAY_ADDRESS "
            "to start one on this machine"
        )


def why_unreachable(address: str) -> str | None:
    """Say why nothing listens at a HOST:PORT address; None if something does, or if it is of another kind."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:  # `auto` or ray://, which answer for themselves
        return None
    try:
        socket.create_connection((host, int(port)), timeout=REACHABLE_S).close()
    except OSError as error:
        return str(error)
    return None


@dataclass
class _Pool:
    """The state of one run: which actors exist and what each is doing."""

    options: RayPool
    runner: Any  # ObjectRef of the runner, stored once for all actors
    queue: deque[Shard]
    gcs_address: str
    starting: dict[Any, Any] = field(default_factory=dict)  # open() call -> actor
    running: dict[Any, tuple[Any, Shard]] = field(default_factory=dict)  # run() call -> actor, shard
    idle: list[Any] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    failed_starts: int = 0
    last_start: float = field(default_factory=time.monotonic)

    def results(self) -> Iterator[ShardResult]:
        """Turn the crank until every shard has its result."""
        while self.queue or self.running:
            self._start_workers()
            self._dispatch()
            answered, _ = ray.wait([*self.starting, *self.running], timeout=PULSE_S)
            for call in answered:
                if call in self.starting:
                    self._settle_start(call)
                else:
                    yield from self._settle_run(call)
            if not answered:
                self._await_cluster()
            self._report_missing_workers()

    def stop(self) -> None:
        """End every actor."""
        for actor in [*self.starting.values(), *(actor for actor, _ in self.running.values()), *self.idle]:
            ray.kill(actor)

    def _start_workers(self) -> None:
        """Ask for as many actors as there is work for; those that find no room yet tell the autoscaler to make some."""
        wanted = min(self.options.max_workers, len(self.queue) + len(self.running))
        while len(self.starting) + len(self.running) + len(self.idle) < wanted:
            actor = (
                ray.remote(RayWorker)
                .options(
                    num_gpus=self.options.num_gpus,
                    num_cpus=self.options.num_cpus,
                    max_restarts=0,
                    max_task_retries=0,
                    # Task events of a long run would fill the memory of the cluster's head.
                    enable_task_events=False,
                )
                .remote(self.runner)
            )
            self.starting[actor.open.remote()] = actor

    def _dispatch(self) -> None:
        while self.idle and self.queue:
            actor, shard = self.idle.pop(), self.queue.popleft()
            self.running[actor.run.remote(shard)] = (actor, shard)

    def _settle_start(self, call: Any) -> None:
        """Take a worker that is up into the pool; one that cannot load its work ends the run with the reason."""
        actor = self.starting.pop(call)
        try:
            failure: Failure | None = ray.get(call)
        except RayError as error:
            self._await_cluster()
            self.failed_starts += 1
            log.warning("a worker was lost while it started: %s", _first_line(error))
            if self.failed_starts > self.options.max_attempts:
                raise RunIncomplete(
                    f"{self.failed_starts} workers in a row died while they started; the last: {_first_line(error)}"
                ) from error
            return
        if failure is not None:
            log.debug("%s", failure.details)
            raise failure.error or RunIncomplete(f"a worker could not start: {failure.message}")
        self.failed_starts = 0
        self.last_start = time.monotonic()
        self.idle.append(actor)
        log.info("%d worker(s) up", len(self.idle) + len(self.running))

    def _settle_run(self, call: Any) -> Iterator[ShardResult]:
        """Yield the result of a shard, or put it back into the queue."""
        actor, shard = self.running.pop(call)
        try:
            outcome: ShardResult | Failure = ray.get(call)
        except RayError as error:
            self._await_cluster()
            ray.kill(actor)  # it may live on, cut off from us: its shard goes elsewhere
            reason = "its worker died" if isinstance(error, RayActorError) else _first_line(error)
            yield from self._retry(shard, reason)
            return
        self.idle.append(actor)
        if isinstance(outcome, ShardResult):
            yield outcome
            return
        log.debug("%s", outcome.details)
        if outcome.is_fatal and outcome.error is not None:
            raise outcome.error
        yield from self._retry(shard, outcome.message)

    def _retry(self, shard: Shard, reason: str) -> Iterator[ShardResult]:
        self.attempts[shard.index] += 1
        attempt = self.attempts[shard.index]
        if attempt >= self.options.max_attempts:
            yield ShardResult(shard=shard.index, error=f"{reason} (attempt {attempt})")
            return
        log.warning(
            "shard %d: %s; attempt %d of %d follows", shard.index, reason, attempt + 1, self.options.max_attempts
        )
        self.queue.append(shard)

    def _await_cluster(self) -> None:
        """Wait while the cluster is away. Raises: Interrupted if it stays away.

        Calls of Ray would block, and after a minute Ray ends this process without a word to its user.
        """
        deadline = time.monotonic() + LOST_S
        while reason := why_unreachable(self.gcs_address):
            if time.monotonic() > deadline:
                raise Interrupted(
                    f"the Ray cluster at {self.gcs_address} is gone ({reason}); run the same command again"
                )
            time.sleep(1)

    def _report_missing_workers(self) -> None:
        """Say what the run is waiting for, when workers do not come."""
        num_up = len(self.running) + len(self.idle)
        if num_up >= self.options.min_workers or not self.starting:
            return
        if time.monotonic() - self.last_start > PATIENCE_S:
            self.last_start = time.monotonic()
            log.warning(
                "%d of %d workers are up; waiting for %d, each with %g GPU and %g CPU (the cluster has %g GPU, %g CPU)",
                num_up,
                self.options.min_workers,
                len(self.starting),
                self.options.num_gpus,
                self.options.num_cpus,
                ray.cluster_resources().get("GPU", 0),
                ray.cluster_resources().get("CPU", 0),
            )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
