"""A shard whose images are made, until its commit.

This module knows the staged images and the commit protocol, not how images are made.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

from flux_batch.errors import count_of
from flux_batch.output.commits import Publisher
from flux_batch.records import Commit, ShardResult, ShardWork
from flux_batch.telemetry import Heartbeat, ShardMetrics
from flux_batch.worker.quality import JudgedShard
from flux_batch.worker.shard import ShardRun
from flux_batch.worker.staging_queue import StagingQueue

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommittedShard:
    """A shard that was committed before this attempt began."""

    commit: Commit

    def finish(self) -> ShardResult:
        """Return the result from the commit."""
        return _result(self.commit)


@dataclass(frozen=True, kw_only=True)
class MadeShard:
    """A shard whose images are made; `finish` may run on another thread while the next shard is made.

    commit: the commit of another attempt that was faster; None if there is none yet. resources: the local files and
    threads of the shard. started: time.monotonic() at the begin of the shard. work: the figures for its commit.
    """

    run: ShardRun | JudgedShard
    staging: StagingQueue
    commit: Commit | None
    publisher: Publisher
    metrics: ShardMetrics
    heartbeat: Heartbeat
    resources: ExitStack
    started: float
    work: ShardWork

    def finish(self) -> ShardResult:
        """Wait until the images are staged, publish the shard, and remove its staged images."""
        with self.resources, self.heartbeat.busy("finish"):
            commit = self._other_commit() or self._publish()
            self.run.clean()
        is_new = commit.worker == self.publisher.worker
        if is_new:
            self._count(commit)
        wall_s = time.monotonic() - self.started
        return replace(_result(commit), is_new=is_new, device_s=self.work.device_s, wall_s=wall_s)

    def _other_commit(self) -> Commit | None:
        if self.commit is None:
            return self.staging.settle()
        self.staging.drain()  # otherwise an image staged after `clean` would remain
        return self.commit

    def _publish(self) -> Commit:
        self.heartbeat.beat("finish")
        run = self.run
        with self.metrics.timed("publish"):
            work = replace(self.work, stage_s=self.metrics.stage_s())
            return self.publisher.publish(run.index, run.ordered_records(), run.images, run.scratch, work)

    def _count(self, commit: Commit) -> None:
        metrics = self.metrics.of_worker
        metrics.add("shards")
        metrics.add("bytes", commit.num_bytes)
        about = {"run": metrics.run, "shard": commit.shard}
        images = count_of(commit.num_images, "image")
        log.info("shard %d: %s, %d failed", commit.shard, images, commit.num_failed, extra=about)


def _result(commit: Commit) -> ShardResult:
    return ShardResult(
        shard=commit.shard,
        worker=commit.worker,
        num_images=commit.num_images,
        num_failed=commit.num_failed,
        num_bytes=commit.num_bytes,
        failures=commit.failures,
    )
