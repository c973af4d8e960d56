"""The process around a worker on a Ray cluster: opens the runner, runs shards, turns exceptions into answers.

What the driver sees as a Ray error is then always the loss of a process or a node, never a matter of the work.
"""

from __future__ import annotations

import logging
import os
import traceback
from dataclasses import dataclass

from flux_batch.engine.protocol import FATAL, Runner, Work, describe
from flux_batch.errors import DeviceFatal, FluxBatchError
from flux_batch.records import Shard, ShardResult

log = logging.getLogger(__name__)

# sysexits.h EX_SOFTWARE; any code will do, os._exit is what makes Ray treat it as a lost process.
DEVICE_FATAL_EXIT = 70


@dataclass(frozen=True)
class Failure:
    """Why a worker could not start or a shard could not be run."""

    message: str
    details: str  # the traceback, for logs and --debug
    is_fatal: bool
    error: FluxBatchError | None  # our own error, to be raised again in the driver


class RayWorker:
    """The actor: one runner, opened once, one shard at a time."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._work: Work | None = None

    def open(self) -> Failure | None:
        """Load what the work needs; apart from the constructor, so that a failure can be answered with its reason."""
        try:
            self._work = self._runner.open()
        except Exception as error:
            return _failure(error)
        return None

    def run(self, shard: Shard) -> ShardResult | Failure:
        """Run one shard."""
        assert self._work is not None
        try:
            return self._work(shard)
        except DeviceFatal:
            log.exception("the device is lost: leaving the process")
            os._exit(DEVICE_FATAL_EXIT)
        except Exception as error:
            return _failure(error)


def _failure(error: Exception) -> Failure:
    return Failure(
        message=describe(error),
        details=traceback.format_exc(),
        is_fatal=isinstance(error, FATAL),
        error=error if isinstance(error, FluxBatchError) else None,
    )
