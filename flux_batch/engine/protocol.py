"""The interfaces of this folder: a factory opens a worker, a worker makes shards, an engine runs workers.

Any program with picklable units of work can use an engine; this module does not know the contents of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from flux_batch.engine.stop import Stop
from flux_batch.records import Attempt, Shard, ShardResult
from flux_batch.telemetry import EngineState, Metrics


class MadeShard(Protocol):
    """A shard that no longer needs the device."""

    def finish(self) -> ShardResult:
        """Publish and commit the shard; may run on another thread while the next shard is made."""
        ...


class Worker(Protocol):
    """A loaded worker; it makes one shard while it finishes another on a second thread.

    Methods other than `make` may be called from any thread.
    """

    def make(self, shard: Shard, attempt: Attempt) -> MadeShard:
        """Do the work that needs the device. Returns: the shard, which can be finished while the next one is made.

        Raises: Stopped after `stop`.
        """
        ...

    def stop(self) -> None:
        """Request that the current shard is put aside once no work is lost by it. Returns at once."""
        ...

    @property
    def metrics(self) -> Metrics:
        """The worker's counters and gauges."""
        ...

    def idle_s(self) -> float:
        """Return the seconds since the last progress of making or finishing a shard; 0 if there is none."""
        ...


class WorkerFactory(Protocol):
    """A picklable description of a worker."""

    def open(self) -> Worker:
        """Load the worker in this process, on the device where it will run."""
        ...


class Engine(Protocol):
    """A place where shards run."""

    def run(
        self, factory: WorkerFactory, shards: Sequence[Shard], stop: Stop, state: EngineState | None = None
    ) -> Iterator[ShardResult]:
        """Run every shard and yield a result for each, in any order; `error` is set if it was given up.

        `state` is kept up to date meanwhile. Once `stop` is requested, no shard is begun, and the iterator ends when
        the running ones are finished or put aside. Shards without a result are left for the next run.
        Raises: the error of a worker that could not start, or an error that every other worker would meet too;
        Interrupted if storage has been unavailable for too long.
        """
        ...


class Cluster(Protocol):
    """A cluster as a pool uses it; see RayCluster."""

    def clock(self) -> float:
        """Return the time in seconds since an arbitrary start."""
        ...

    def start_actor(self) -> Any:
        """Start one more worker process once there is room for it. Returns: its handle."""
        ...

    def call(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor; `wait` returns the call once it is answered."""
        ...

    def ask(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor; `wait` does not return the call."""
        ...

    def wait(self, timeout_s: float) -> list[Future[Any]]:
        """Wait for answers, for `timeout_s` at most. Returns: the calls answered since the last wait."""
        ...

    def kill(self, actor: Any) -> None:
        """End the process of an actor at once."""
        ...

    def check(self) -> None:
        """Wait while the cluster does not answer. Raises: Interrupted if it does not come back."""
        ...

    def caused_loss(self, node: str, error: BaseException | None) -> bool:
        """Return whether a process was lost because its node was lost; `node` is empty if it never had one."""
        ...

    def leaving_nodes(self) -> set[str]:
        """Return all nodes that are or were being drained."""
        ...

    @property
    def node(self) -> str:
        """The node of this process."""
        ...

    def resources(self) -> Mapping[str, float]:
        """Return the cluster's total of each resource."""
        ...
