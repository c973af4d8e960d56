"""The two nouns of this folder: a runner, which is what to do, and an engine, which is where to do it.

Any program with picklable units of work can use an engine; nothing here knows what a shard holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from flux_batch.errors import CheckpointError, FluxBatchError, JobError, StoreRefused
from flux_batch.records import Shard, ShardResult

Work = Callable[[Shard], ShardResult]

# Errors that every worker would meet again: the run ends with the first one.
FATAL = (JobError, CheckpointError, StoreRefused)


class Runner(Protocol):
    """A picklable recipe for a worker."""

    def open(self) -> Work:
        """Make the worker, in the process and on the device where it will run."""
        ...


class Engine(Protocol):
    """A place where shards run."""

    def run(self, runner: Runner, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Run every shard and yield a result for each, in any order; `error` is set on those given up.

        Raises: the error of a worker that could not start, or that no other worker could do better.
        """
        ...


def describe(error: BaseException) -> str:
    """Say what an error was: our own speak for themselves, others need their class."""
    return str(error) if isinstance(error, FluxBatchError) else f"{type(error).__name__}: {error}"
