"""One driver a run: a lease in the output, with an epoch, a heartbeat and an expiry.

    _run/lease/NNNNN.json    one object an epoch, created by put-if-absent; the highest epoch counts

Of two drivers that see the same latest epoch, one creates the next one and has the run. It overwrites its own object
every quarter of `ttl_s` with a higher number of beats, and at its end with `is_released`. A driver that finds the run
held takes it over (creates the next epoch) when

- the holder released it, or
- the holder was a process of this very machine that has ended, or
- the number of beats stood still for the holder's `ttl_s` by the watcher's own clock: clocks are never compared.

A holder that was paused, or cut off, learns of its successor from the listing: at its next beat, and before every write
of the driver, since what it writes goes through a HeldStore. Nothing fences the moment between that look and the write
itself. What can slip through there is an object that both drivers write alike (job.yaml, README.md, _SUCCESS) or that
the next write of the successor mends (progress.json, report.json); the plan and the data of workers are put-if-absent.

On a store without conditional writes two drivers can both have written the same epoch. Each therefore waits SETTLE_S
and reads it back: whoever is not in there has lost. One whose write took longer than that to land ends up in the object
alone, and the other finds out at its next beat or write.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

from flux_batch.errors import AlreadyExists, Interrupted, LeaseLost, NotFound, RunHeld, StoreError
from flux_batch.output.paths import LEASE, number_in
from flux_batch.output.process_id import ProcessId
from flux_batch.storage.store import WRITES, Store

T = TypeVar("T")

log = logging.getLogger(__name__)

VERSION = 1
TTL_S = 60.0
# Beats in the time of a lease: three may be lost.
BEATS_A_LEASE = 4
# How often a watcher looks; what it costs is one listing and one small object.
LOOK_S = 1.0
# On stores without conditional writes: how long a write that began before ours may take to land.
SETTLE_S = 2.0
# How often an object may be gone between the listing and the read.
LOOKS = 5
# Epochs left to read for whoever wonders what happened.
EPOCHS_KEPT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """What stands in the object of an epoch. The times are of the holder's clock, and for people only."""

    epoch: int
    id: str  # of this taking of the lease; no two are alike
    process: ProcessId
    ttl_s: float
    beats: int = 0
    is_released: bool = False
    since_unix_time: float
    seen_unix_time: float

    def __str__(self) -> str:
        return str(self.process)

    def to_json(self) -> bytes:
        """Write it down."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Holder:
        """Read it. Raises: ValueError, KeyError or TypeError if it is something else."""
        fields = json.loads(data)
        fields.pop("version")
        return cls(**fields | {"process": ProcessId(**fields["process"])})


def read_holder(store: Store) -> Holder | None:
    """Read who has the run, or who had it last; None if nobody ever did. Raises: StoreError if that is damaged."""
    for _ in range(LOOKS):
        epochs = _epochs(store)
        if not epochs:
            return None
        key = _key(epochs[-1])
        try:
            return Holder.from_json(store.read(key))
        except NotFound:
            continue  # deleted since the listing: there is a later one, or none
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{store.url(key)}: not a lease of this program ({error!r}); if no driver is at work, delete it"
            ) from error
    raise StoreError(f"{store.url(LEASE)}: lists objects that cannot be read")


class Lease:
    """The lease of a run, from the side of the driver that wants it. A context manager: taken, kept, released.

    `ttl_s` is how many seconds this driver may be out of touch before another may go on with the run. `on_lost` is
    called once, from another thread, with a sentence, when another has. `clock` counts seconds from anywhere; `sleep`
    may raise, which ends the wait for a lease that another driver holds.
    """

    def __init__(
        self,
        store: Store,
        *,
        ttl_s: float = TTL_S,
        on_lost: Callable[[str], None] = log.error,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._on_lost = on_lost
        self._clock = clock
        self._sleep = sleep
        self._held: Holder | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Lease:
        self.acquire()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    @property
    def holder(self) -> Holder:
        """What stands in the output of this driver's lease."""
        assert self._held is not None, "the lease was not acquired"
        return self._held

    def acquire(self) -> None:
        """Take the run. Waits as long as it takes to see whether the present holder is alive, at most its `ttl_s`.

        Raises: RunHeld, StoreError, and what `sleep` raises.
        """
        try:
            while not self._try_to_acquire():
                pass
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """Raise LeaseLost unless this driver still has the run. Costs a listing and a read."""
        latest = read_holder(self._store)
        if latest is None or latest.id != self.holder.id:
            raise LeaseLost(_lost(self._store, self.holder, latest))

    def beat(self) -> None:
        """Give a sign of life. Raises: LeaseLost, StoreError."""
        with self._writing:
            if not self._ended.is_set():
                self.check()
                self._write(replace(self.holder, beats=self.holder.beats + 1))

    def release(self) -> None:
        """Let the next driver have the run at once; what goes wrong here costs it a wait. Safe to call twice."""
        with self._writing:
            if self._held is None or self._ended.is_set():
                return
            self._ended.set()
            try:
                self.check()
                self._write(replace(self.holder, is_released=True))
            except LeaseLost:
                return
            except (StoreError, Interrupted) as error:  # a store that waits can be stopped
                log.warning("the lease could not be released, the next run waits %g s: %s", self._ttl_s, error)

    def _try_to_acquire(self) -> bool:
        last = read_holder(self._store)
        if last is not None and not self._may_follow(last):
            return False
        return self._claim(1 if last is None else last.epoch + 1)

    def _may_follow(self, last: Holder) -> bool:
        """Find out whether the run can be had after `last`; False if it has changed hands meanwhile.

        Raises: RunHeld once `last` has given a sign of life.
        """
        if last.is_released or last.process.is_gone():
            return True
        log.info("%s: held by %s; waiting up to %g s for a sign of life", self._store.uri, last, last.ttl_s)
        until = self._clock() + last.ttl_s
        while (left := until - self._clock()) > 0:
            self._sleep(min(LOOK_S, left, last.ttl_s / BEATS_A_LEASE))
            now = read_holder(self._store)
            # A killed process may take seconds to end, while a disk has it.
            if now is None or now.id != last.id or now.is_released or now.process.is_gone():
                return False
            if now.beats != last.beats:
                raise _held(self._store, now)
        log.warning("%s: %s gave no sign of life for %g s; taking the run over", self._store.uri, last, last.ttl_s)
        return True

    def _claim(self, epoch: int) -> bool:
        """Try to create an epoch. Returns: whether it is ours. Raises: RunHeld if another driver was quicker."""
        now = round(time.time(), 3)
        self._held = Holder(
            epoch=epoch,
            id=uuid.uuid4().hex,
            process=ProcessId.own(),
            ttl_s=self._ttl_s,
            since_unix_time=now,
            seen_unix_time=now,
        )
        with suppress(AlreadyExists):  # that may mean a lost answer to our own write: what is in there tells
            self._store.put_if_absent(_key(epoch), self._held.to_json())
        if not self._store.has_conditional_put:
            self._sleep(SETTLE_S)
        latest = read_holder(self._store)
        if latest is not None and latest.id == self._held.id:
            self._delete_old_epochs()
            return True
        self._held = None
        if latest is not None and not latest.is_released and not latest.process.is_gone():
            raise _held(self._store, latest)  # it came just now: that is sign of life enough
        return False

    def _write(self, holder: Holder) -> None:
        holder = replace(holder, seen_unix_time=round(time.time(), 3))
        self._store.write(_key(holder.epoch), holder.to_json())
        self._held = holder

    def _delete_old_epochs(self) -> None:
        for epoch in _epochs(self._store):
            if epoch <= self.holder.epoch - EPOCHS_KEPT:
                self._store.delete(_key(epoch))

    def _keep(self) -> None:
        """Beat until the end."""
        while not self._ended.wait(_pause_s(self._ttl_s, self.holder.beats)):
            try:
                self.beat()
            except LeaseLost as error:
                self._on_lost(str(error))
                return
            except (StoreError, Interrupted) as error:
                log.warning("no sign of life could be written, the next try follows: %s", error)


class HeldStore(Store):
    """A store for the driver alone: before each write, and each new try of one, it looks whether it still has the run.

    Every write raises what `check` raises.
    """

    def __init__(
        self, uri: str, storage_options: Mapping[str, Any] | None = None, *, check: Callable[[], None], **options: Any
    ) -> None:
        super().__init__(uri, storage_options, **options)
        self._check = check

    def _call(self, key: str, operation: str, function: Callable[[], T]) -> T:
        def checked() -> T:
            self._check()  # at every try: a storage that was away for long comes back to another driver
            return function()

        return super()._call(key, operation, checked if operation in WRITES else function)


def _pause_s(ttl_s: float, beats: int) -> float:
    """Give the time to the next beat; the first follow quickly, so that a driver that came second is told soon."""
    return min(ttl_s / BEATS_A_LEASE, 2.0 ** min(beats, 10))


def _key(epoch: int) -> str:
    return f"{LEASE}/{epoch:05d}.json"


def _epochs(store: Store) -> list[int]:
    numbers = (number_in(key.rpartition("/")[2], ".json") for key in store.list(LEASE))
    return sorted(number for number in numbers if number is not None)


def _held(store: Store, holder: Holder) -> RunHeld:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(holder.since_unix_time))
    return RunHeld(
        f"{store.uri}: {holder} is at work on this run, since {since} UTC; "
        "let it finish, or stop it, and then run the same command again"
    )


def _lost(store: Store, mine: Holder, latest: Holder | None) -> str:
    if latest is None or latest.epoch < mine.epoch:
        return f"{store.uri}: the lease of this driver is gone from {LEASE}; it stops, and the same command goes on"
    return (
        f"{store.uri}: {latest} has taken this run over, since {mine} gave no sign of life for {mine.ttl_s:g} s; "
        "this one stops and leaves it to the other"
    )
