"""The engine without a cluster: one worker in this process, for tests and a single device.

A shard is finished on a second thread while the next one is made. A third is not begun before the first is finished.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from flux_batch.engine.backoff import FIRST_PAUSE_S, Backoff
from flux_batch.engine.failure import Failure
from flux_batch.engine.protocol import Worker, WorkerFactory
from flux_batch.engine.shard_queue import ShardQueue, Task
from flux_batch.engine.stop import POLL_S, Stop
from flux_batch.errors import Interrupted
from flux_batch.records import Shard, ShardResult
from flux_batch.telemetry import EngineState, WorkerState


@dataclass(frozen=True)
class LocalEngine:
    """Runs shards in this process, with `max_attempts` attempts each, and waits `outage_s` for storage.

    Nothing supervises this process: a hanging worker hangs the run, and a lost device ends it; the same command resumes
    it. A stop waits until the worker has put its shard aside, without a time limit, but not until it has loaded.
    """

    max_attempts: int = 3
    outage_s: float = 1800
    backoff_s: float = FIRST_PAUSE_S

    def run(
        self,
        factory: WorkerFactory,
        shards: Sequence[Shard],
        stop: Stop | None = None,
        state: EngineState | None = None,
    ) -> Iterator[ShardResult]:
        """Run every shard in order until a stop is requested; retry failed ones at the end."""
        stop, state = stop or Stop(), state or EngineState()
        if stop.is_requested:
            return
        seen = state.start()
        seen.placed_at, state.waiting_for = time.monotonic(), "the model to load"
        try:
            worker = _opened(factory, stop)
            if worker is None:
                return
            seen.up_at, state.waiting_for = time.monotonic(), ""
            queue = ShardQueue(shards, self.max_attempts, self.outage_s)
            with _watching(stop, worker, seen), ThreadPoolExecutor(1, "finish") as finisher:
                yield from _Loop(worker, finisher, queue, Backoff(self.backoff_s), stop, state, seen).results()
        finally:
            state.end(seen)


@dataclass
class _Loop:
    """The state of one run: the queue of shards, and the shards that are being finished."""

    worker: Worker
    finisher: ThreadPoolExecutor
    queue: ShardQueue
    backoff: Backoff
    stop: Stop
    state: EngineState
    seen: WorkerState
    in_flight: deque[tuple[Task, Future[ShardResult]]] = field(default_factory=deque)
    is_worker_stopped: bool = False

    def results(self) -> Iterator[ShardResult]:
        """Make and finish shards until none is left or a stop is requested."""
        while (task := self._next()) or self.in_flight:
            if task and (result := self._make(task)):
                yield result
            if len(self.in_flight) > (1 if task else 0) and (result := self._finish()):
                yield result

    def _next(self) -> Task | None:
        return None if self.is_worker_stopped or self.stop.is_requested else self.queue.next()

    def _make(self, task: Task) -> ShardResult | None:
        """Make a shard and begin to finish it. Returns: its result if it is given up."""
        self.state.begin(self.seen, task.shard.index)
        try:
            made = self.worker.make(task.shard, task.attempt)
        except Exception as error:
            return self._settle(task, _failure(error))
        self.in_flight.append((task, self.finisher.submit(made.finish)))
        return None

    def _finish(self) -> ShardResult | None:
        """Wait for the shard that was made first. Returns: its result, None if it is retried."""
        task, future = self.in_flight.popleft()
        try:
            outcome: ShardResult | Failure = future.result()
        except Exception as error:
            outcome = _failure(error)
        return self._settle(task, outcome)

    def _settle(self, task: Task, outcome: ShardResult | Failure) -> ShardResult | None:
        self.state.settle(task.shard.index)
        result = self.queue.settle(task, outcome)
        if isinstance(outcome, ShardResult):
            self.backoff.reset()
        elif outcome.kind == "stopped":
            self.is_worker_stopped = True
        elif outcome.kind == "storage_unavailable":
            with suppress(Interrupted):  # after a stop, which the loop notices
                self.stop.sleep(self.backoff.begin())
        return result


def _opened(factory: WorkerFactory, stop: Stop) -> Worker | None:
    """Open a worker; return None if a stop is requested first, and leave its daemon thread running."""
    opened: Future[Worker] = Future()

    def load() -> None:
        try:
            opened.set_result(factory.open())
        except BaseException as error:
            opened.set_exception(error)

    threading.Thread(target=load, name="open", daemon=True).start()
    while not wait([opened], POLL_S).done:
        if stop.is_requested:
            return None
    return opened.result()


def _failure(error: Exception) -> Failure:
    """Return the failure of an error. Raises: the error itself if this process cannot continue."""
    failure = Failure.of(error)
    if failure.kind == "device_lost":
        raise error
    return failure


@contextmanager
def _watching(stop: Stop, worker: Worker, seen: WorkerState) -> Iterator[None]:
    """Run the block; meanwhile read the worker's figures, and forward a stop request to it."""
    is_over = threading.Event()

    def watch() -> None:
        is_told = False
        while not is_over.wait(POLL_S):
            seen.update(worker.metrics.figures())
            if stop.is_requested and not is_told:
                is_told = True
                worker.stop()

    watcher = threading.Thread(target=watch, name="watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
