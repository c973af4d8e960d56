"""The meaning of a worker's error for an engine; only this module decides which errors are retried."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Literal

from flux_batch.errors import (
    AlreadyExists,
    CheckpointError,
    DamagedObject,
    DeviceFatal,
    FluxBatchError,
    JobError,
    NotFound,
    Stopped,
    StoreError,
    StoreRefused,
)

# run_failed: every worker would meet the error, so the run ends. device_lost: the process must be replaced.
# stopped: the shard was put aside on request. storage_unavailable: not the shard's fault, so it is retried until
# storage has been unavailable for too long. shard_failed: the shard is retried a limited number of times.
# worker_failed: shards fail on this worker one after the other, so the shard is retried elsewhere; only pools use it.
FailureKind = Literal["run_failed", "device_lost", "stopped", "storage_unavailable", "shard_failed", "worker_failed"]


@dataclass(frozen=True)
class Failure:
    """An error of a worker, in a form that can be sent between processes.

    `details` is the traceback. `error` is the error itself if it is one of ours. `waited_s` is the number of seconds
    for which the worker waited for the storage before the error was raised.
    """

    kind: FailureKind
    message: str
    details: str = ""
    error: FluxBatchError | None = None
    waited_s: float = 0.0

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the Failure that describes an error."""
        ours = error if isinstance(error, FluxBatchError) else None
        return cls(
            kind=_kind_of(error),
            message=str(error) if ours else f"{type(error).__name__}: {error}",
            details="".join(traceback.format_exception(error)),
            error=ours,
            waited_s=getattr(error, "waited_s", 0.0),
        )


def _kind_of(error: Exception) -> FailureKind:
    match error:
        case JobError() | CheckpointError() | StoreRefused():
            return "run_failed"
        case DeviceFatal():
            return "device_lost"
        case Stopped():
            return "stopped"
        case NotFound() | AlreadyExists() | DamagedObject():  # StoreErrors about a key: the storage has answered
            return "shard_failed"
        case StoreError():
            return "storage_unavailable"
    return "shard_failed"
