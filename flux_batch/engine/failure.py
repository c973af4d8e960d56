"""The meaning of a worker's error to an engine: the one place that decides which errors are tried again."""

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
# stopped: the shard was put aside on request. storage_unavailable: not the shard's fault, so it is tried again until
# storage has been away for too long. shard_failed: the shard is tried again a limited number of times. worker_failed: a
# pool's word for a shard that failed on a worker where all do, which is tried again elsewhere.
FailureKind = Literal["run_failed", "device_lost", "stopped", "storage_unavailable", "shard_failed", "worker_failed"]


@dataclass(frozen=True)
class Failure:
    """An error of a worker, in a form that crosses processes.

    `details` is the traceback. `error` is the error itself if it is one of ours. `waited_s` is how many seconds the
    storage was waited for before the error was raised.
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
        case NotFound() | AlreadyExists() | DamagedObject():  # storage answered: these are StoreErrors about a key
            return "shard_failed"
        case StoreError():
            return "storage_unavailable"
    return "shard_failed"
