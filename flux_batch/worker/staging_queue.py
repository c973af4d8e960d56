"""Encoding and staging of made images in the background, while the device makes the next.

This module knows threads and their order, but not how images are computed or how a shard is published.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from flux_batch.output.commits import Commits
from flux_batch.output.staging import StagedImage
from flux_batch.records import Commit
from flux_batch.telemetry import Metrics, ShardMetrics
from flux_batch.worker.generate import ImageOutcome
from flux_batch.worker.shard import ShardRun


class StagingQueue:
    """Encodes and stages the batches of one shard, in order, on its own threads.

    Between two batches it can look for other attempts at the shard. As a context manager it waits for its threads at
    the end.
    """

    def __init__(
        self,
        run: ShardRun,
        commits: Commits,
        num_encoders: int,
        metrics: Metrics | ShardMetrics,
        on_progress: Callable[[], None],
    ) -> None:
        self._run = run
        self._commits = commits
        self._metrics = metrics
        self._on_progress = on_progress
        self._encoders = ThreadPoolExecutor(num_encoders, "encode")
        self._stager = ThreadPoolExecutor(1, "stage")
        self._in_flight: deque[Future[None]] = deque()
        self._polled: Future[Commit | None] | None = None
        self._num_put = 0

    def __enter__(self) -> StagingQueue:
        """Return this queue."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the threads to end."""
        self._stager.shutdown()
        self._encoders.shutdown()

    def put(self, outcomes: Sequence[ImageOutcome]) -> None:
        """Encode and stage a batch in the background."""
        self._metrics.gauge_add("encode_queue", len(outcomes))
        self._metrics.gauge_add("stage_queue", 1)
        self._num_put += 1
        encoded = [self._encoders.submit(self._encode, outcome) for outcome in outcomes]
        self._in_flight.append(self._stager.submit(self._stage, encoded))

    def wait(self, max_in_flight: int = 0) -> None:
        """Wait until at most `max_in_flight` batches are not staged. Raises: errors of encoding or staging."""
        while len(self._in_flight) > max_in_flight:
            self._in_flight.popleft().result()

    def poll(self) -> None:
        """Look for other attempts at the shard after the batches put so far are staged."""
        self._polled = self._stager.submit(self._other_commit)

    def polled_commit(self) -> Commit | None:
        """Wait for the last `poll`. Returns: the commit of another attempt that it found; None without a poll."""
        return self._polled.result() if self._polled else None

    def drain(self) -> None:
        """Wait until nothing is in flight, and ignore errors."""
        wait(self._in_flight)

    def settle(self) -> Commit | None:
        """Wait until all batches are staged. Returns: the commit of another attempt, if there is one.

        A shard of a single batch is not checked for one.
        """
        self.wait()
        return self._other_commit() if self._num_put > 1 else None

    def _encode(self, outcome: ImageOutcome) -> StagedImage:
        try:
            with self._metrics.timed("encode"):
                return self._run.encode(outcome)
        finally:
            self._metrics.gauge_add("encode_queue", -1)

    def _stage(self, images: Sequence[Future[StagedImage]]) -> None:
        try:
            with self._metrics.timed("stage"):
                self._run.stage(images)
        finally:
            self._metrics.gauge_add("stage_queue", -1)
        self._on_progress()

    def _other_commit(self) -> Commit | None:
        return None if self._run.adopt_others() else self._commits.find(self._run.index)
