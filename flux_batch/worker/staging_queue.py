"""The way of made images to the staging area, while the device makes the next.

Knows threads and their order; does not know what computes images nor how a shard is published.
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
    """Encodes and stages the batches of one shard, in order, on threads of its own.

    Between two batches it can look for other attempts at the shard. A context manager, which waits for its threads at
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
        """Return itself."""
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
        """Wait until at most `max_in_flight` batches are not staged. Raises: what encoding or staging them raised."""
        while len(self._in_flight) > max_in_flight:
            self._in_flight.popleft().result()

    def poll(self) -> None:
        """Look for other attempts at the shard once the batches before are staged."""
        self._polled = self._stager.submit(self._other_commit)

    def polled_commit(self) -> Commit | None:
        """Return the commit of another attempt that the last `poll` found, None without a poll; waits for it."""
        return self._polled.result() if self._polled else None

    def drain(self) -> None:
        """Wait until nothing is in flight, whatever becomes of it."""
        wait(self._in_flight)

    def settle(self) -> Commit | None:
        """Wait until all batches are staged. Returns: the commit of another attempt, if there was time for one.

        The shard of a single batch is not polled for.
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
