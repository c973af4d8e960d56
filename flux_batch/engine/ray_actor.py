"""The process around a worker on a Ray cluster: opens the runner, runs shards, turns exceptions into answers.

What the driver sees as a Ray error is then always the loss of a process or a node, never a matter of the work.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray

from flux_batch.engine.protocol import Kind, MadeShard, Runner, Work, describe, kind_of
from flux_batch.engine.ray_metrics import WorkerMetrics
from flux_batch.errors import FluxBatchError
from flux_batch.records import Attempt, Shard, ShardResult

log = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])

# The concurrency groups whose methods are served while a shard is made, each by a thread.
WATCH = "watch"
FINISH = "finish"
# sysexits.h EX_SOFTWARE; any code will do, os._exit is what makes Ray treat it as a lost process.
DEVICE_FATAL_EXIT = 70
# A process whose device is lost says so and is killed by the driver; it leaves by itself if that does not happen.
LEAVE_S = 5.0


def watched(method: Method) -> Method:
    """Have a method of the actor served whatever else is done."""
    return cast(Method, ray.method(concurrency_group=WATCH)(method))


def finishing(method: Method) -> Method:
    """Have a method of the actor served while the next shard is made."""
    return cast(Method, ray.method(concurrency_group=FINISH)(method))


@dataclass(frozen=True)
class Failure:
    """Why a worker could not start or a shard could not be run."""

    message: str
    details: str  # the traceback, for logs and --debug
    kind: Kind
    error: FluxBatchError | None  # our own error, to be raised again in the driver


class RayWorker:
    """The actor: one runner, opened once, one shard made and one finished at a time; needs both concurrency groups."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._work: Work | None = None
        self._made: dict[int, MadeShard] = {}

    def open(self) -> Failure | None:
        """Load what the work needs; apart from the constructor, so that a failure can be answered with its reason."""
        try:
            self._work = self._runner.open()
            self._metrics = WorkerMetrics(self._work.metrics)
            self._metrics.start()
        except Exception as error:
            return _failure(error)
        return None

    def make(self, shard: Shard, attempt: Attempt) -> Failure | None:
        """Make one shard."""
        assert self._work is not None
        try:
            self._made[shard.index] = self._work.make(shard, attempt)
        except Exception as error:
            return _failure(error)
        return None

    @finishing
    def finish(self, index: int) -> ShardResult | Failure:
        """Finish a shard that was made."""
        try:
            return self._made.pop(index).finish()
        except Exception as error:
            return _failure(error)
        finally:
            self._metrics.tell()  # the last one of a run is killed once it has answered

    @watched
    def node_id(self) -> str:
        """Tell on which node this process is."""
        return str(ray.get_runtime_context().get_node_id())

    @watched
    def idle_s(self) -> float:
        """Tell how long ago the last sign of progress was; to answer at all is a sign of life."""
        return self._work.idle_s() if self._work else 0.0

    @watched
    def stop(self) -> None:
        """Have the shard in hand put aside."""
        if self._work:
            self._work.stop()


def _failure(error: Exception) -> Failure:
    kind = kind_of(error)
    if kind == "lost":
        log.error("the device is lost, and this process with it: %s", error)
        leave = threading.Timer(LEAVE_S, os._exit, [DEVICE_FATAL_EXIT])
        leave.daemon = True
        leave.start()
    return Failure(
        message=describe(error),
        details=traceback.format_exc(),
        kind=kind,
        error=error if isinstance(error, FluxBatchError) else None,
    )
