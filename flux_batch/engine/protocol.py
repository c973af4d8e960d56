"""The interfaces of this folder: a factory opens a worker, a worker makes shards, an engine runs workers.

Any program with picklable units of work can use an engine; nothing here knows the contents of a shard.
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
    """A loaded worker, which makes one shard while it finishes another on a second thread.

    The other methods may be called from any thread.
    """

    def make(self, shard: Shard, attempt: Attempt) -> MadeShard:
        """Do the work that needs the device. Returns: the shard, to be finished while the next one is made.

        Raises: Stopped after `stop`.
        """
        ...

    def stop(self) -> None:
        """Request that the current shard is put aside once nothing is lost by it. Returns at once."""
        ...

    @property
    def metrics(self) -> Metrics:
        """The worker's counters and gauges."""
        ...

    def idle_s(self) -> float:
        """Return the seconds since the last progress of a shard that is made or finished; 0 without one."""
        ...


class WorkerFactory(Protocol):
    """A picklable description of a worker."""

    def open(self) -> Worker:
        """Load the worker, in the process and on the device where it will run."""
        ...


class Engine(Protocol):
    """A place where shards run."""

    def run(
        self, factory: WorkerFactory, shards: Sequence[Shard], stop: Stop, state: EngineState | None = None
    ) -> Iterator[ShardResult]:
        """Run every shard and yield a result for each, in any order; `error` is set if it was given up.

        `state` is kept up to date meanwhile, for whoever watches.

        Once `stop` is requested no shard is begun, and the iterator ends when the running ones are finished or put
        aside: shards without a result are left for the next run.
        Raises: the error of a worker that could not start, or an error that every other worker would meet too;
        Interrupted if storage has been unavailable for too long.
        """
        ...


class Cluster(Protocol):
    """A cluster as a pool uses it. The clock counts seconds from anywhere."""

    def clock(self) -> float:
        """Return the time, in seconds."""
        ...

    def start_actor(self) -> Any:
        """Start one more process of a worker, where there is room for it. Returns: its handle."""
        ...

    def call(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor. `wait` returns the call once it is answered."""
        ...

    def ask(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor without waiting for its answer."""
        ...

    def wait(self, timeout_s: float) -> list[Future[Any]]:
        """Wait until a call is answered. Returns: those that are since the last wait, none after `timeout_s`."""
        ...

    def kill(self, actor: Any) -> None:
        """End the process of an actor at once."""
        ...

    def check(self) -> None:
        """Wait while the cluster does not answer. Raises: Interrupted if it stays away."""
        ...

    def caused_loss(self, node: str, error: BaseException | None) -> bool:
        """Return whether a process was lost because its node was; `node` is empty if it never had one."""
        ...

    def leaving_nodes(self) -> set[str]:
        """Return the nodes that were or are being drained."""
        ...

    @property
    def node(self) -> str:
        """The node of this process."""
        ...

    def resources(self) -> Mapping[str, float]:
        """Return how much of each resource the cluster has."""
        ...
