"""The progress of a run: a line in the log and a small object beside the commits, once an interval at most."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flux_batch.output.commit_log import CommitLog
from flux_batch.output.paths import PROGRESS
from flux_batch.records import ShardResult
from flux_batch.report.summary import Totals
from flux_batch.storage.store import Store

log = logging.getLogger(__name__)

_REPORT_INTERVAL_S = 5.0


@dataclass
class Progress:
    """The progress of one invocation; `totals` starts with the shards committed before it.

    `commit_log` is kept up to date too.
    """

    store: Store
    num_shards: int
    totals: Totals
    commit_log: CommitLog | None = None
    clock: Callable[[], float] = time.monotonic
    num_new_images: int = 0
    num_new_shards: int = 0
    device_s: float = 0.0
    workers: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._reported_at = self._started
        self._reported: int | None = None  # committed shards in the last report
        self._first_shard_at: float | None = None  # rates do not count the start of workers

    @property
    def wall_s(self) -> float:
        """The seconds since this invocation began its work."""
        return self.clock() - self._started

    def add(self, result: ShardResult) -> None:
        """Add a result, and report if the last report is old enough."""
        if result.error is not None:
            self.errors.append(f"shard {result.shard}: {result.error}")
            log.error("shard %d failed for good: %s", result.shard, result.error, extra={"shard": result.shard})
            return
        self.totals.add(result)
        if self.commit_log:
            self.commit_log.add(result)
            if self.commit_log.is_due:
                self.commit_log.write()
        if result.is_new:
            self._add_new(result)
        if self.clock() - self._reported_at >= _REPORT_INTERVAL_S or self.totals.num_committed == self.num_shards:
            self.report()

    def _add_new(self, result: ShardResult) -> None:
        if self._first_shard_at is None:
            self._first_shard_at = self.clock() - result.wall_s
        self.workers.add(result.worker)
        self.num_new_images += result.num_images
        self.num_new_shards += 1
        self.device_s += result.device_s

    def finish(self) -> None:
        """Report unless the last report is complete: an earlier driver may have been killed before its own."""
        if self.commit_log:
            self.commit_log.write()
        if self._reported != self.totals.num_committed:
            self.report()

    def report(self) -> None:
        """Write a line to the log, and the progress object."""
        self._reported_at = self.clock()
        self._reported = self.totals.num_committed
        working_s = 0.0 if self._first_shard_at is None else self.clock() - self._first_shard_at
        rate = self.num_new_images / working_s if working_s else 0.0
        shards_left = self.num_shards - self.totals.num_committed
        eta_s = shards_left * working_s / self.num_new_shards if self.num_new_shards else None
        log.info(
            "%d of %d shards, %d images (%d failed), %.2f images/s%s",
            self.totals.num_committed,
            self.num_shards,
            self.totals.num_images,
            self.totals.num_failed,
            rate,
            f", {duration(eta_s)} left" if eta_s else "",
        )
        body = {
            "num_shards": self.num_shards,
            "num_committed": self.totals.num_committed,
            "num_images": self.totals.num_images,
            "num_failed": self.totals.num_failed,
            "images_per_s": round(rate, 4),
            "eta_s": None if eta_s is None else round(eta_s),
            "unix_time": round(time.time()),
        }
        self.store.write(PROGRESS, json.dumps(body, indent=1).encode())


def duration(seconds: float) -> str:
    """Return a time span in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while len(units) > 1 and not units[0][0]:
        units.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in units[:2])
