"""The exception tree, grouped by what the caller should do next.

    FluxBatchError                  exit 1   unexpected: look at the message, perhaps report it
    |-- JobError                    exit 2   change the job file or the command; never retried
    |   |-- InvalidSetting                   one setting has a value that cannot be used
    |   `-- PlanMismatch                     the output already holds another run
    |-- SourceError                 exit 2   the prompts cannot be read: change the data or `prompts`
    |-- CheckpointError             exit 2   the model weights are missing, incomplete or of another layout
    |-- RowError                             this row only: becomes a failed record, its shard still commits
    |-- OutOfMemory                          this batch only: try a smaller one
    |-- Stopped                              this shard only: stopped half made on request, its images staged
    |-- DeviceFatal                          the accelerator is unusable: the process must leave
    |-- StoreError                  exit 75  storage failed after all retries: run the same command again
    |   |-- DiskFull                exit 75  a disk is full: make room and run the same command again
    |   |-- StoreRefused            exit 2   the storage refused: credentials, bucket or permissions
    |   |-- NotFound                exit 2   the storage has no object under that key
    |   |-- DamagedObject           exit 2   a file of the run is damaged: the message says how to repair it
    |   `-- AlreadyExists                    a put-if-absent found the key taken; often not an error
    |-- RunIncomplete               exit 1   shards failed more often than allowed
    `-- Interrupted                 exit 75  stopped from outside: run the same command again
        |-- RunHeld                          another driver is at work on the run: wait, or stop it
        `-- LeaseLost                        another driver took the run over: nothing to do

Every error is one clear sentence: what was wrong, where, what would be right. Every error can be pickled, because Ray
sends them between processes: one positional message, context in optional keyword-only attributes.
No message contains the possible secrets of an address.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from flux_batch.redaction import public_text

# Fewer device hours than these are printed as seconds.
_FEW_HOURS = 0.1


class FluxBatchError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(public_text(message))


class JobError(FluxBatchError, ValueError):
    """The job file or the command line asks for something that cannot be done."""

    exit_code = 2


class InvalidSetting(JobError):
    """One setting has an unusable value; `field` is its name, the message says what would be right."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class PlanMismatch(JobError):
    """The output holds a run whose images differ from what the job file asks for."""


class SourceError(FluxBatchError):
    """The prompts are missing or unreadable, or have the wrong schema."""

    exit_code = 2


class CheckpointError(FluxBatchError):
    """Model weights are missing, incomplete, of the wrong shape, or of an unsupported layout."""

    exit_code = 2


class RowError(FluxBatchError, ValueError):
    """One prompt row cannot be rendered; it is recorded as failed with this message."""


class OutOfMemory(FluxBatchError):
    """The device has too little memory for this batch."""


class Stopped(FluxBatchError):
    """A worker was asked to stop in the middle of a shard; its finished images are staged."""


class DeviceFatal(FluxBatchError):
    """The accelerator reported an error; this process cannot use it any more."""


class StoreError(FluxBatchError, OSError):
    """A storage operation failed; `waited_s` is the number of seconds it was retried."""

    exit_code = 75
    waited_s = 0.0


class DiskFull(StoreError):
    """A disk is full; the message names the disk or the folder on it."""


class StoreRefused(StoreError):
    """Storage refused an operation: wrong credentials, no such bucket, no permission."""

    exit_code = 2


class NotFound(StoreError):
    """The storage has no object under a key."""

    exit_code = 2


class DamagedObject(StoreError):
    """An object that this program wrote has other contents now; running again does not help."""

    exit_code = 2


class AlreadyExists(StoreError):
    """A put-if-absent found the key taken."""


class RunIncomplete(FluxBatchError):
    """Some shards could not be committed within the allowed attempts."""


class Interrupted(FluxBatchError):
    """The run was stopped from outside; committed shards stay, the same command continues."""

    exit_code = 75


class RunHeld(Interrupted):
    """Another driver holds the lease of the run."""


class LeaseLost(Interrupted):
    """Another driver took over the run, because this one did not renew its lease."""


def one_line(error: BaseException) -> str:
    """Return the message of any error as one public line; its type if it has no message."""
    return " ".join(public_text(str(error)).split()) or type(error).__name__


def bytes_text(num_bytes: float) -> str:
    """Return a number of bytes as text in a suitable unit.

    >>> bytes_text(4321), bytes_text(12_345_678_901)
    ('4.3 kB', '12.3 GB')
    """
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 999.95:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} TB"


def number_text(number: float) -> str:
    """Return a number as text with three significant digits, or its whole integer part.

    >>> number_text(0.01234), number_text(7.0), number_text(55_555.5)
    ('0.0123', '7', '55556')
    """
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"


def work_text(hours: float, device: str) -> str:
    """Return the total hours of all devices as text; in seconds if they are few.

    >>> work_text(2324.2, "GPU"), work_text(0.00125, "worker")
    ('2324 GPU-hours', '4.5 worker-seconds')
    """
    is_short = 0 < hours < _FEW_HOURS
    return f"{number_text(3600 * hours if is_short else hours)} {device}-{'seconds' if is_short else 'hours'}"


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural.

    >>> count_of(1, "image"), count_of(12, "image")
    ('1 image', '12 images')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that suggests the nearest name in `known`; empty if none is near.

    >>> did_you_mean("widht", ["width", "height"])
    "; did you mean 'width'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
