"""The lease of a run, which one driver holds at a time: an object in the output, with an epoch and a heartbeat.

    _run/lease/NNNNN.json    one object an epoch, created by put-if-absent; the highest epoch counts

Of two drivers that see the same latest epoch, one creates the next one and has the run. It overwrites its own object
every two fifths of `ttl_s` with a higher number of heartbeats, and at its end with `is_released`. A driver that finds
the run held takes it over (creates the next epoch) when

- the holder released it, or
- the holder was a process of this very machine that has ended, or
- the number of heartbeats stood still for the holder's `ttl_s` by the watcher's own clock: clocks are never compared.

A holder that was paused, or cut off, learns of its successor from the listing: at its next heartbeat, and before every
write of the driver, which goes through `Lease.store`. As long as its heartbeats are on time it need not look, since
nobody can have seen them stand still for `ttl_s`: half of that after the last one it looks again, and once more before
the heartbeat after. Every LOOK_BEATS heartbeats it looks in any case, for pauses that its clock does not show. Nothing
fences the moment between a look and the write. A write that slips through there is of an object that both drivers write
alike (job.yaml, README.md, _SUCCESS) or that the next write of the successor mends (progress.json, report.json); the
plan and the data of workers are put-if-absent.

On a store without conditional writes two drivers can both have written the same epoch. Each therefore waits SETTLE_S
and reads it back: a driver that is not in there has lost. If its write took longer than that to land, it is in the
object after all, and the other finds out at its next heartbeat or write, before which each looks on such a store.
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
# Heartbeats in the time of a lease: one may be lost. With the looks they are less than three requests a minute.
BEATS_PER_LEASE = 2.5
# The share of a lease in which its holder is sure of it.
_SURE = 0.5
# Heartbeats from one look at the listing to the next, where none is late.
LOOK_BEATS = 15
# The interval in which a waiting driver reads the lease: a listing and one small object each time.
_POLL_S = 1.0
# The time that an earlier write may take to land, on stores without conditional writes.
SETTLE_S = 2.0
# Listings that may name an object which is gone when it is read.
_MAX_READS = 5
# Seconds before an empty object is read again.
_REREAD_S = 0.1
# The longest time of a release: a store that does not answer gets no more of it. A heartbeat that is on its way
# then has less.
_RELEASE_S = 1.5
_LAST_BEAT_S = 1.0
# Epochs that are kept, for people who wonder what happened.
_EPOCHS_KEPT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The contents of an epoch's object. Its times are of the holder's clock, and for people only."""

    epoch: int
    id: str  # unique to each time that the lease is acquired
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
    """Return the present or the last holder of a run; None if there was none. Raises: DamagedObject."""
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
    """Return the seconds of a clock that counts while the machine sleeps, too."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """A driver's lease of a run; a context manager that acquires, keeps and releases it.

    `store` is what the driver writes through: it raises LeaseLost before a write once another driver has the run.
    `ttl_s` is the number of seconds that this driver may be out of touch before another may go on with the run.
    When another does, that is logged, and `on_lost` is called with the sentence, once, from another thread. `clock`
    counts seconds from anywhere; `sleep` may raise, which ends the wait for a lease that another driver holds.
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
        """Acquire the run; wait until it is clear whether the present holder is alive, at most its `ttl_s`.

        Raises: RunHeld, StoreError, and what `sleep` raises.
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

        It takes two seconds at most, and after a stop no more than that has: without it, the next driver waits for
        `ttl_s`.
        """
        if self._ended.is_set():
            return
        self._released = time.monotonic()
        self._ended.set()  # which ends a heartbeat that waits for the storage
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

        If it was on time, nobody has waited for it for a whole lease. After a late one another driver may be about to
        create the next epoch, and is looked for until the next one.
        """
        is_on_time = self._clock() - self._beaten < self._ttl_s * _SURE
        self._beaten = began
        if is_on_time and self._store.has_conditional_put:
            self._sure_until = began + self._ttl_s * _SURE

    def _check_kept(self, after_s: float = 0.0) -> None:
        """Raise Interrupted once the lease was released, at least `after_s` seconds ago."""
        if time.monotonic() - self._released >= after_s:
            raise Interrupted("the lease is being released")

    def _check_hurry(self) -> None:
        """Raise Interrupted once the release has taken its time. A StoreError would count as an answer."""
        if time.monotonic() - self._released >= _RELEASE_S:
            raise Interrupted(f"{self._store.uri}: no answer")

    def _try_to_acquire(self) -> bool:
        last = read_holder(self._store)
        if last is not None and not self._may_follow(last):
            return False
        return self._claim(1 if last is None else last.epoch + 1)

    def _may_follow(self, last: Holder) -> bool:
        """Return whether `last` may be followed; False if the run has changed hands meanwhile.

        Raises: RunHeld once `last` has written a heartbeat.
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
            # A killed process may take seconds to end, while it waits for a disk.
            if now is None or now.id != last.id or now.is_released or now.process.is_gone():
                return False
            if now.beats != last.beats:
                raise _held(self._store, now)
        log.warning("%s: %s gave no sign of life for %g s; taking the run over", self._store.uri, last, last.ttl_s)
        return True

    def _claim(self, epoch: int) -> bool:
        """Create an epoch. Returns: whether it is ours. Raises: RunHeld if another driver was quicker."""
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
        with suppress(AlreadyExists):  # perhaps by our own write, whose answer was lost: the contents tell
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
            raise _held(self._store, latest)  # it came just now, so it is alive
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
            except Exception as error:  # clients of storage raise anything; without heartbeats the run is taken over
                if self._ended.is_set():
                    return
                log.warning("the heartbeat of the lease could not be written, the next try follows: %s", error)


def pause_s(ttl_s: float, beats: int) -> float:
    """Return the seconds to the next heartbeat; the first ones follow quickly, so that a rival soon sees it."""
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
