"""The lease of a run, held by one driver at a time: an object in the output, with an epoch and a heartbeat.

    _run/lease/NNNNN.json    one object for each epoch, created by put-if-absent; the highest epoch counts

If two drivers see the same latest epoch, only one can create the next one, and has the run. It overwrites its own
object every two fifths of `ttl_s` with a higher number of heartbeats, and at its end with `is_released`. A driver that
finds the run held takes it over (creates the next epoch) if

- the holder has released it, or
- the holder was a process of the same machine that has ended, or
- the number of heartbeats has not changed for the holder's `ttl_s`, by the waiting driver's own clock: clocks of two
  machines are never compared.

A holder that was paused or disconnected learns of its successor by listing the epochs: at its next heartbeat, and
before every write of the driver, which goes through `Lease.store`. While its heartbeats are on time it need not check,
since nobody can have seen an unchanged heartbeat for `ttl_s`. Half of `ttl_s` after its last heartbeat it checks again,
and once more before the next heartbeat. Every LOOK_BEATS heartbeats it checks in any case, for pauses that its clock
does not show. Nothing protects the moment between a check and the write. A write in that moment is harmless: both
drivers write the same object (job.yaml, README.md, _SUCCESS), or the successor's next write replaces it
(progress.json, report.json); the plan and the data of workers are put-if-absent.

On a store without conditional writes, two drivers can both write the same epoch. Each therefore waits SETTLE_S and
reads it back: the driver that the object does not name has lost. If a write takes longer than that, the object names
its driver after all. The other driver finds out at its next heartbeat or write: on such a store each driver checks
before all of these.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from flux_batch.errors import AlreadyExists, DamagedObject, Interrupted, LeaseLost, NotFound, RunHeld, StoreError
from flux_batch.output.paths import LEASE, number_in
from flux_batch.output.process_id import ProcessId
from flux_batch.storage.store import Store

log = logging.getLogger(__name__)

_VERSION = 1
_TTL_S = 60.0
# The number of heartbeats in `ttl_s`: one may be lost. With the checks they are less than three requests a minute.
BEATS_PER_LEASE = 2.5
# The share of `ttl_s` after a heartbeat in which the holder is sure to have the lease.
_SURE = 0.5
# The number of heartbeats between two checks of the listing if none is late.
LOOK_BEATS = 15
# The interval at which a waiting driver reads the lease: a listing and one small object each time.
_POLL_S = 1.0
# The time that an earlier write may take to arrive, on stores without conditional writes.
SETTLE_S = 2.0
# The number of listings to try if the listed object is gone when it is read.
_MAX_READS = 5
# Seconds before an empty object is read again.
_REREAD_S = 0.1
# The longest time that a release waits for the store. A heartbeat that is in flight then gets less.
_RELEASE_S = 1.5
_LAST_BEAT_S = 1.0
# The number of epochs to keep, for people who investigate what happened.
_EPOCHS_KEPT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The contents of an epoch's object. Its times come from the holder's clock and are for people only."""

    epoch: int
    id: str  # unique for each acquisition
    process: ProcessId
    ttl_s: float
    beats: int = 0
    is_released: bool = False
    since_unix_time: float
    seen_unix_time: float

    def __str__(self) -> str:
        return str(self.process)

    def to_json(self) -> bytes:
        """Return the bytes of the object."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Holder:
        """Read the bytes of an object. Raises: ValueError, KeyError or TypeError if it is something else."""
        fields = json.loads(data)
        fields.pop("version")
        return cls(**fields | {"process": ProcessId(**fields["process"])})


def read_holder(store: Store) -> Holder | None:
    """Return the current or last holder of a run; None if there was none. Raises: DamagedObject."""
    for num_left in reversed(range(_MAX_READS)):
        epochs = _epochs(store)
        if not epochs:
            return None
        key = _key(epochs[-1])
        try:
            data = store.read(key)
        except NotFound:
            continue  # deleted since the listing: there is a later one, or none
        if not data and num_left:
            time.sleep(_REREAD_S)  # some servers show an object as empty while it is replaced
            continue
        try:
            return Holder.from_json(data)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedObject(
                f"{store.url(key)}: not a lease of this program ({error!r}); if no driver is at work, delete it"
            ) from error
    raise StoreError(f"{store.url(LEASE)}: lists objects that cannot be read")


def uptime_s() -> float:
    """Return the seconds of a clock that also counts while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """A driver's lease of a run; a context manager that acquires, keeps and releases it.

    `store`: the driver writes through it; it raises LeaseLost before a write if another driver has the run. `ttl_s`:
    the seconds without a heartbeat after which another driver may take the run over. If that happens, it is logged, and
    `on_lost` is called once with the sentence, from another thread. `clock`: returns seconds, from any start; `sleep`:
    may raise, which ends the wait for a lease that another driver holds.
    """

    def __init__(
        self,
        store: Store,
        *,
        ttl_s: float = _TTL_S,
        on_lost: Callable[[str], None] | None = None,
        clock: Callable[[], float] = uptime_s,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store = store.guarded(self.check)
        self._unkept_store = store
        self._store = store.ended_by(self._check_kept, lambda waited_s: self._check_kept(_LAST_BEAT_S))
        self._ttl_s = ttl_s
        self._on_lost = on_lost
        self._clock = clock
        self._sleep = sleep
        self._held: Holder | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._released = math.inf  # when `release` was called
        self._beaten = -math.inf  # when the last heartbeat was begun
        self._sure_until = -math.inf

    def __enter__(self) -> Lease:
        self.acquire()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    @property
    def holder(self) -> Holder:
        """The contents of the lease that this driver holds."""
        assert self._held is not None, "the lease was not acquired"
        return self._held

    def acquire(self) -> None:
        """Acquire the run. If it is held, wait at most `ttl_s` to see whether the holder is alive.

        Raises: RunHeld, StoreError, and the errors of `sleep`.
        """
        try:
            while not self._try_to_acquire():
                pass
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """Raise LeaseLost unless this driver still has the run. Costs a listing and a read after a late heartbeat."""
        if self._clock() < self._sure_until:
            return
        latest = read_holder(self._store)
        if latest is None or latest.id != self.holder.id:
            raise LeaseLost(_lost(self._store, self.holder, latest))

    def beat(self) -> None:
        """Write a heartbeat. Raises: LeaseLost, StoreError."""
        with self._writing:
            if not self._ended.is_set():
                if self.holder.beats % LOOK_BEATS == 0:
                    self._sure_until = -math.inf
                self.check()
                began = self._clock()
                self._write(replace(self.holder, beats=self.holder.beats + 1))
                self._note_beat(began)

    def release(self) -> None:
        """Release the run, so that the next driver need not wait for it. Safe to call twice.

        It takes two seconds at most, since a stopped process may get no more time. Without a release, the next driver
        waits for `ttl_s`.
        """
        if self._ended.is_set():
            return
        self._released = time.monotonic()
        self._ended.set()  # ends a heartbeat that waits for the storage
        with self._writing:
            if self._held is None:
                return
            self._store = self._unkept_store.ended_by(self._check_hurry, lambda waited_s: self._check_hurry())
            try:
                self.check()
                self._sure_until = -math.inf
                self._write(replace(self.holder, is_released=True))
            except LeaseLost:
                return
            except (StoreError, Interrupted) as error:  # a store that waits can be interrupted
                log.warning("the lease could not be released, the next run waits %g s: %s", self._ttl_s, error)

    def _note_beat(self, began: float) -> None:
        """Note that a heartbeat, begun at `began`, was written.

        If it was on time, no other driver has waited for `ttl_s`. After a late heartbeat another driver may be about to
        create the next epoch, so every write checks for it until the next heartbeat.
        """
        is_on_time = self._clock() - self._beaten < self._ttl_s * _SURE
        self._beaten = began
        if is_on_time and self._store.has_conditional_put:
            self._sure_until = began + self._ttl_s * _SURE

    def _check_kept(self, after_s: float = 0.0) -> None:
        """Raise Interrupted if the lease was released at least `after_s` seconds ago."""
        if time.monotonic() - self._released >= after_s:
            raise Interrupted("the lease is being released")

    def _check_hurry(self) -> None:
        """Raise Interrupted if the release has taken too long. A StoreError would count as an answer."""
        if time.monotonic() - self._released >= _RELEASE_S:
            raise Interrupted(f"{self._store.uri}: no answer")

    def _try_to_acquire(self) -> bool:
        last = read_holder(self._store)
        if last is not None and not self._may_follow(last):
            return False
        return self._claim(1 if last is None else last.epoch + 1)

    def _may_follow(self, last: Holder) -> bool:
        """Return whether this driver may take over from `last`; False if another has done so meanwhile.

        Raises: RunHeld as soon as `last` has written a heartbeat.
        """
        if last.is_released or last.process.is_gone():
            return True
        log.info(
            "%s: another driver (%s) has this run; checking whether it is alive (up to %g s)",
            self._store.uri,
            last,
            last.ttl_s,
        )
        until = self._clock() + last.ttl_s
        while (left := until - self._clock()) > 0:
            self._sleep(min(_POLL_S, left, last.ttl_s / BEATS_PER_LEASE))
            now = read_holder(self._store)
            # A killed process that waits for a disk may take seconds to end.
            if now is None or now.id != last.id or now.is_released or now.process.is_gone():
                return False
            if now.beats != last.beats:
                raise _held(self._store, now)
        log.warning("%s: %s gave no sign of life for %g s; taking the run over", self._store.uri, last, last.ttl_s)
        return True

    def _claim(self, epoch: int) -> bool:
        """Create an epoch. Returns: whether it is ours. Raises: RunHeld if another driver was faster."""
        now = round(time.time(), 3)
        self._beaten = self._clock()
        self._held = Holder(
            epoch=epoch,
            id=uuid.uuid4().hex,
            process=ProcessId.own(),
            ttl_s=self._ttl_s,
            since_unix_time=now,
            seen_unix_time=now,
        )
        with suppress(AlreadyExists):  # it may be our own write, whose answer was lost: the contents show it
            self._store.put_if_absent(_key(epoch), self._held.to_json())
        if not self._store.has_conditional_put:
            self._sleep(SETTLE_S)
        latest = read_holder(self._store)
        if latest is not None and latest.id == self._held.id:
            self._note_beat(self._beaten)
            self._delete_old_epochs()
            return True
        self._held = None
        if latest is not None and not latest.is_released and not latest.process.is_gone():
            raise _held(self._store, latest)  # it has just written this, so it is alive
        return False

    def _write(self, holder: Holder) -> None:
        holder = replace(holder, seen_unix_time=round(time.time(), 3))
        self._store.write(_key(holder.epoch), holder.to_json())
        self._held = holder

    def _delete_old_epochs(self) -> None:
        for epoch in _epochs(self._store):
            if epoch <= self.holder.epoch - _EPOCHS_KEPT:
                self._store.delete(_key(epoch))

    def _keep(self) -> None:
        """Write heartbeats until the end."""
        while not self._ended.wait(pause_s(self._ttl_s, self.holder.beats)):
            try:
                self.beat()
            except LeaseLost as error:
                log.warning("%s", error)
                if self._on_lost:
                    self._on_lost(str(error))
                return
            except Exception as error:  # of any class: without heartbeats the run would be taken over
                if self._ended.is_set():
                    return
                log.warning("the heartbeat of the lease could not be written, the next try follows: %s", error)


def pause_s(ttl_s: float, beats: int) -> float:
    """Return the seconds to the next heartbeat; the first ones come quickly, so that a waiting driver soon sees one."""
    return min(ttl_s / BEATS_PER_LEASE, 2.0 ** min(beats, 10))


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
        return f"{store.uri}: the lease of this driver is gone from {LEASE}; it stops, run the same command again"
    return (
        f"{store.uri}: {latest} has taken this run over, since {mine} gave no sign of life for {mine.ttl_s:g} s; "
        "this driver stops"
    )
