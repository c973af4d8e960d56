"""The three nouns of this folder: a runner, which is what to do; its work, which does it; an engine, where it is done.

Any program with picklable units of work can use an engine; nothing here knows what a shard holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from flux_batch.engine.stop import Stop
from flux_batch.errors import (
    AlreadyExists,
    CheckpointError,
    DeviceFatal,
    FluxBatchError,
    JobError,
    NotFound,
    Stopped,
    StoreError,
    StoreRefused,
)
from flux_batch.records import Attempt, Shard, ShardResult
from flux_batch.telemetry import Metrics

# What an error asks an engine to do: end the run; leave the process; take the shard back, which was only put aside;
# wait for the storage; try again, but not for ever.
Kind = Literal["fatal", "lost", "stopped", "outage", "failed"]


class MadeShard(Protocol):
    """A shard with which the device is done."""

    def finish(self) -> ShardResult:
        """Take the shard to its commit; may be called on another thread while the next shard is made."""
        ...


class Work(Protocol):
    """A worker that is ready: makes one shard after the other, and finishes one after the other on another thread.

    The other methods may come from any thread.
    """

    def make(self, shard: Shard, attempt: Attempt) -> MadeShard:
        """Do what needs the device. Returns: the shard, to be finished while the next one is made.

        Raises: Stopped after `stop`.
        """
        ...

    def stop(self) -> None:
        """Put the shard that is made aside as soon as nothing is lost by it, and take no other; returns at once."""
        ...

    @property
    def metrics(self) -> Metrics:
        """The figures of what it has done so far."""
        ...

    def idle_s(self) -> float:
        """Return the seconds since the last progress of what is made or finished; 0 while nothing is."""
        ...


class Runner(Protocol):
    """A picklable recipe for a worker."""

    def open(self) -> Work:
        """Make the worker, in the process and on the device where it will run."""
        ...


class Engine(Protocol):
    """A place where shards run."""

    def run(self, runner: Runner, shards: Sequence[Shard], stop: Stop) -> Iterator[ShardResult]:
        """Run every shard and yield a result for each, in any order; `error` is set on those given up.

        Once `stop` is requested no shard is begun, and the iterator ends when those that run are finished or put
        aside: shards without a result are left for the next run.
        Raises: the error of a worker that could not start, or that no other worker could do better; Interrupted when
        the storage has failed for too long.
        """
        ...


def kind_of(error: BaseException) -> Kind:
    """Tell what an error asks an engine to do."""
    match error:
        case JobError() | CheckpointError() | StoreRefused():  # every worker would meet it again
            return "fatal"
        case DeviceFatal():
            return "lost"
        case Stopped():
            return "stopped"
        case NotFound() | AlreadyExists():
            return "failed"
        case StoreError():
            return "outage"
    return "failed"


def describe(error: BaseException) -> str:
    """Say what an error was: our own speak for themselves, others need their class."""
    return str(error) if isinstance(error, FluxBatchError) else f"{type(error).__name__}: {error}"
