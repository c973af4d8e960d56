"""The progress of a running run: at an interval, a log line and a small object beside the commits."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flux_batch.errors import Interrupted, StoreError
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.paths import PROGRESS
from flux_batch.records import ShardResult
from flux_batch.report.progress.snapshot import SlowestWorker, Snapshot
from flux_batch.report.summary import Totals
from flux_batch.storage.retry import RetryPolicy
from flux_batch.storage.store import Store
from flux_batch.telemetry import EngineState, ShardCount, WorkerState

log = logging.getLogger(__name__)

TICK_S = 1.0
_REPORT_INTERVAL_S = 10.0
# The number of finally failed shards whose reasons are in the report; the log has all of them.
_MAX_ERRORS = 1000
# Seconds to wait for the thread of the figures to end: a report that is checking the lease ends by itself.
_JOIN_S = 1.0
# Seconds to wait for a report that is being written when the run is over.
_LAST_REPORT_S = 1.0


@dataclass
class Progress:
    """The progress of one invocation; `totals` starts with the shards committed before it.

    `commit_log` is updated too. num_left: the images of the remaining shards, as far as known; expected: the images of
    one such shard. past_worker_s: the seconds for which workers of earlier invocations had their devices. num_gpus: the
    GPUs of a worker. price: of an hour of a GPU, or of a worker without GPU. stop_reason: the reason why the run is
    ending, "" while it continues; stop_advice: how to continue it then. has_file: whether reports are also written
    beside the commits. check: called every second with the figures. first_images: the text for what the run waits for
    between the start of a worker and its first image.
    """

    store: Store
    num_shards: int
    totals: Totals
    commit_log: CommitLog | None = None
    clock: Callable[[], float] = time.monotonic
    num_left: int | None = None
    expected: Callable[[int], int] = field(default=lambda shard: 0)
    past_worker_s: float = 0.0
    num_gpus: float = 0.0
    price: float | None = None
    stop_reason: Callable[[], str] = str
    stop_advice: Callable[[], str] = str
    check: Callable[[Snapshot], None] = field(default=lambda now: None)
    first_images: str = "the first images"
    has_file: bool = True
    state: EngineState = field(default_factory=EngineState)
    num_new_images: int = 0
    num_made: int = 0  # of these, without failed ones and those of earlier invocations
    num_new_shards: int = 0
    device_s: float = 0.0
    workers: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    last: Snapshot | None = None  # the figures of the last report

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._reported_at = self._started
        self._reported: int | None = None  # committed shards in the last report
        self._first_shard_at: float | None = None  # rates exclude the start of workers
        self._last_shard: int | None = None
        self._adopted: dict[int, int] = {}  # images that earlier invocations made, by shard
        self._level = logging.INFO
        self._lock = threading.RLock()  # shared by the thread that adds results and the one that shows figures

    @property
    def wall_s(self) -> float:
        """The seconds since this invocation began its work."""
        return self.clock() - self._started

    @property
    def worker_s(self) -> float:
        """The seconds for which workers had their devices, over all invocations."""
        return self.past_worker_s + self.state.worker_s

    @contextmanager
    def shown(self, show: Callable[[Snapshot], None] | None = None) -> Iterator[EngineState]:
        """Report at an interval while the block runs. Log what the run waits for whenever that changes.

        show: called every second with the figures, which are then not logged, until it raises an error. Yields: the
        state that the engine must update.
        """
        is_over = threading.Event()
        self._level = logging.INFO if show is None else logging.DEBUG
        first = self.snapshot()
        self.check(first)
        said = first.waiting_for

        def watch() -> None:
            nonlocal said, show
            while not is_over.wait(TICK_S):
                now = self.snapshot()
                self.check(now)
                if show is not None:
                    try:
                        show(now)
                    except Exception as error:  # of any class: this thread enforces limits
                        log.warning("the figures cannot be shown, the log has them from now on: %r", error)
                        self._level, show = logging.INFO, None
                if self.clock() - self._reported_at >= _REPORT_INTERVAL_S:
                    self._report_on_the_side(is_over)
                elif now.waiting_for not in ("", said):
                    log.log(self._level, "%s", now.line(self.price))
                said = now.waiting_for

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield self.state
        finally:
            is_over.set()
            watcher.join(_JOIN_S)

    def add(self, result: ShardResult) -> None:
        """Add a result, and report if the last report is old enough."""
        if result.error is not None:
            if len(self.errors) < _MAX_ERRORS:
                self.errors.append(f"shard {result.shard}: {result.error}")
            log.error("shard %d failed for good: %s", result.shard, result.error, extra={"shard": result.shard})
            return
        with self._lock:
            self.totals.add(result)
            self._last_shard = result.shard
            if self.num_left is not None:
                self.num_left -= self.expected(result.shard)
            if result.is_new:
                self._add_new(result)
        if self.commit_log:
            self.commit_log.add(result)
            if self.commit_log.is_due:
                self.commit_log.write()
        if self.clock() - self._reported_at >= _REPORT_INTERVAL_S or self.totals.num_committed == self.num_shards:
            self.report()

    def _add_new(self, result: ShardResult) -> None:
        if self._first_shard_at is None:
            self._first_shard_at = self.clock() - result.wall_s
        self.workers.add(result.worker)
        self.num_new_images += result.num_images
        self.num_made += max(0, result.num_images - result.num_failed - self._adopted.get(result.shard, 0))
        self.num_new_shards += 1
        self.device_s += result.device_s

    def finish(self) -> None:
        """Report unless the last report is complete: an earlier driver may have been killed before it."""
        if self.commit_log:
            self.commit_log.write()
        if self._reported != self.totals.num_committed:
            self.report()

    def report(self) -> None:
        """Write a line to the log, and the progress object."""
        self._write(self.store)

    def _report_on_the_side(self, is_over: threading.Event) -> None:
        """Report from another thread. If the storage fails, only the report is lost.

        The end of the run does not wait for a storage that does not answer.
        """

        def check(waited_s: float) -> None:
            if is_over.is_set() and waited_s >= _LAST_REPORT_S:
                raise Interrupted("the run is over")

        try:
            self._write(self.store.with_policy(RetryPolicy(attempts=1, on_request=check)))
        except (StoreError, Interrupted) as error:
            log.debug("the progress could not be written: %s", error)

    def _write(self, store: Store) -> None:
        with self._lock:
            self._reported_at = self.clock()
            self._reported = self.totals.num_committed
            now = self.last = self.snapshot()
            log.log(self._level, "%s", now.line(self.price), extra={"progress": now.to_json()})
            body = now.to_json() | {"worker_s": round(self.worker_s, 3)}
        if self.has_file:
            store.write(PROGRESS, json.dumps(body, indent=1).encode())

    def snapshot(self) -> Snapshot:
        """Return the current figures."""
        with self._lock:
            workers = self.state.workers
            in_hand = _in_hand(workers)
            self._adopted |= {shard: count.num_adopted for shard, count in in_hand.items() if count.num_adopted}
            num_staged = sum(count.num_done for count in in_hand.values())
            failures = Counter(self.totals.failures)
            for count in in_hand.values():
                failures.update(count.failures)
            if self._first_shard_at is None:
                self._first_shard_at = self.state.first_began_at
            working_s = 0.0 if self._first_shard_at is None else self.clock() - self._first_shard_at
            num_made = self.num_new_images + num_staged - sum(self._adopted.values())
            rate = max(0, num_made) / working_s if working_s > 0 else 0.0
            num_left = self._num_left(in_hand)
            up = [worker for worker in workers if worker.up_at is not None]
            return Snapshot(
                num_shards=self.num_shards,
                num_committed=self.totals.num_committed,
                num_images=self.totals.num_images,
                num_failed=self.totals.num_failed,
                num_staged=num_staged,
                num_expected=None if num_left is None else self.totals.num_images + num_left,
                failures=dict(failures),
                images_per_s=rate,
                eta_s=max(0, num_left - num_staged) / rate if rate and num_left is not None else None,
                elapsed_s=self.wall_s,
                device_hours=self.worker_s * (self.num_gpus or 1) / 3600,
                device="GPU" if self.num_gpus else "worker",
                workers_up=len(up),
                workers_starting=len(workers) - len(up),
                busy_share=_busy_share(up),
                last_shard=self._last_shard,
                slowest=_slowest(up),
                waiting_for=self._waiting_for(up, num_made),
                stopped_by=f"{reason}; {self.stop_advice()}" if (reason := self.stop_reason()) else "",
                unix_time=time.time(),
            )

    def _num_left(self, in_hand: dict[int, ShardCount]) -> int | None:
        """Return the images of the remaining shards; for shards in progress the exact number once it is known."""
        if self.num_left is None:
            return None
        known = sum(count.num_images - self.expected(shard) for shard, count in in_hand.items() if count.num_images)
        return self.num_left + known

    def _waiting_for(self, up: list[WorkerState], num_made: int) -> str:
        """Return the text for what the run waits for: the engine's, or the first images, which take longest."""
        if reason := self.stop_reason():
            return f"the shards in hand to be finished or put aside ({reason})"
        is_first = bool(up) and num_made <= 0 and not self.num_new_shards
        return self.state.waiting_for or (self.first_images if is_first else "")


def _in_hand(workers: tuple[WorkerState, ...]) -> dict[int, ShardCount]:
    """Return the counts of shards in progress; if two workers run a shard, those of the faster one."""
    found: dict[int, ShardCount] = {}
    for worker in workers:
        for shard, count in list(worker.in_hand.items()):
            if shard not in found or count.num_done > found[shard].num_done:
                found[shard] = count
    return found


def _busy_share(up: list[WorkerState]) -> float | None:
    """Return the share of their time in which workers made images; None without workers."""
    now = time.monotonic()
    held_s = sum(now - worker.up_at for worker in up if worker.up_at is not None)
    busy_s = sum(worker.busy_s for worker in up)
    return min(1.0, busy_s / held_s) if held_s and busy_s else None


def _slowest(up: list[WorkerState]) -> SlowestWorker | None:
    """Return the worker with the longest time on its shard; None without others to compare."""
    at_work = [(began_at, worker, shard) for worker in up for shard, began_at in list(worker.began_at.items())]
    if len({worker.number for _, worker, _ in at_work}) < 2:
        return None
    began_at, worker, shard = min(at_work, key=lambda each: each[0])
    name = worker.name or f"worker {worker.number}"
    return SlowestWorker(name=name, shard=shard, seconds=round(time.monotonic() - began_at, 1))
