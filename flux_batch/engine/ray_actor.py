"""The Ray actor around a worker: it opens it, runs its shards, and returns exceptions as answers.

So a Ray error that reaches the driver always means the loss of a process or a node, never an error of the work.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import ray

from flux_batch.engine.failure import Failure
from flux_batch.engine.protocol import MadeShard, Worker, WorkerFactory
from flux_batch.engine.ray_metrics import WorkerMetrics
from flux_batch.records import Attempt, Shard, ShardResult
from flux_batch.telemetry import LOADING, WorkerFigures

log = logging.getLogger(__name__)

_Method = TypeVar("_Method", bound=Callable[..., Any])

# The concurrency groups of methods that run while a shard is made, each on its own thread.
_WATCH = "watch"
_FINISH = "finish"
# EX_SOFTWARE of sysexits.h. Any code would do: after os._exit Ray reports a lost process.
_DEVICE_LOST_EXIT = 70
# A process whose device is lost answers, and the driver kills it. If that does not happen, it exits after this time.
_EXIT_DELAY_S = 5.0


def _watching(method: _Method) -> _Method:
    """Make a method of the actor run at any time, also while others run."""
    return cast(_Method, ray.method(concurrency_group=_WATCH)(method))


def _finishing(method: _Method) -> _Method:
    """Make a method of the actor run while the next shard is made."""
    return cast(_Method, ray.method(concurrency_group=_FINISH)(method))


class WorkerActor:
    """A worker in its process; it makes one shard and finishes another at the same time."""

    def __init__(self, factory: WorkerFactory) -> None:
        self._factory = factory
        self._worker: Worker | None = None
        self._made: dict[int, MadeShard] = {}

    def open(self, after_s: float) -> Failure | None:
        """Load the worker after `after_s` seconds; unlike the constructor, this can return the reason of a failure."""
        with LOADING.busy("load"):
            time.sleep(after_s)
            try:
                self._worker = self._factory.open()
                self._metrics = WorkerMetrics(self._worker.metrics)
                self._metrics.start()
            except Exception as error:
                return _failure(error)
        return None

    def make(self, shard: Shard, attempt: Attempt) -> Failure | None:
        """Make one shard."""
        assert self._worker is not None
        try:
            self._made[shard.index] = self._worker.make(shard, attempt)
        except Exception as error:
            return _failure(error)
        return None

    @_finishing
    def finish(self, index: int) -> ShardResult | Failure:
        """Finish a shard that was made."""
        try:
            return self._made.pop(index).finish()
        except Exception as error:
            return _failure(error)
        finally:
            self._metrics.export()  # now: after the last answer of a run, the process is killed at once

    @_watching
    def node_id(self) -> str:
        """Return the id of the node that this process runs on."""
        return str(ray.get_runtime_context().get_node_id())

    @_watching
    def idle_s(self) -> float:
        """Return the seconds since the last progress, also of loading; any answer is a sign of life."""
        return self._worker.idle_s() if self._worker else LOADING.idle_s()

    @_watching
    def figures(self) -> tuple[str, WorkerFigures]:
        """Return the name of this process, and the figures of its worker."""
        figures = self._worker.metrics.figures() if self._worker else WorkerFigures({})
        return f"{socket.gethostname()}:{os.getpid()}", figures

    @_watching
    def stop(self) -> None:
        """Request that the current shard is put aside."""
        if self._worker:
            self._worker.stop()


def _failure(error: Exception) -> Failure:
    """Return the failure of an error; the process exits soon if its device is lost."""
    failure = Failure.of(error)
    if failure.kind == "device_lost":
        log.error("the device is lost, so this process exits: %s", error)
        timer = threading.Timer(_EXIT_DELAY_S, os._exit, [_DEVICE_LOST_EXIT])
        timer.daemon = True
        timer.start()
    return failure


def make_actor_class(num_gpus: float, num_cpus: float, runtime_env: Mapping[str, Any] | None = None) -> Any:
    """Return the Ray class of a pool's actors; call it once, since Ray stores the class in the cluster."""
    return ray.remote(
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={_WATCH: 1, _FINISH: 1},
        # Task events of a long run would fill the memory of the head node.
        enable_task_events=False,
        runtime_env=dict(runtime_env) if runtime_env else None,
    )(WorkerActor)
