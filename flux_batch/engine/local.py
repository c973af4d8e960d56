"""The engine without a cluster: one worker in this process, one shard after the other. For tests and one device.

A shard is finished on a thread of its own while the next is made, and no third is begun before it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from flux_batch.engine.backoff import FIRST_REST_S, Outage, Rest
from flux_batch.engine.protocol import Runner, Work, describe, kind_of
from flux_batch.engine.shard_queue import ShardQueue, Task
from flux_batch.engine.stop import LOOK_S, Stop
from flux_batch.errors import Interrupted
from flux_batch.records import Shard, ShardResult


@dataclass(frozen=True)
class LocalEngine:
    """Runs shards here and now; each gets `max_attempts` tries, and storage `outage_s` seconds to come back.

    Nobody watches this process: work that hangs, hangs, and a lost device ends the run, which the same command goes
    on with. A stop waits for the work to put its shard aside, however long that takes.
    """

    max_attempts: int = 3
    outage_s: float = 1800
    rest_s: float = FIRST_REST_S

    def run(self, runner: Runner, shards: Sequence[Shard], stop: Stop | None = None) -> Iterator[ShardResult]:
        """Run every shard, in order but for those that are tried again, until somebody asks to stop."""
        stop = stop or Stop()
        if stop.is_requested:
            return
        work = runner.open()
        rounds = _Rounds(ShardQueue(shards, self.max_attempts), Outage(self.outage_s), Rest(self.rest_s), stop)
        with _told_to_stop(work, stop), ThreadPoolExecutor(1, "finish") as finisher:
            yield from rounds.results(work, finisher)


@dataclass
class _Rounds:
    """The state of one run: which shards wait, which one is being finished."""

    queue: ShardQueue
    outage: Outage
    rest: Rest
    stop: Stop
    behind: deque[tuple[Task, Future[ShardResult]]] = field(default_factory=deque)
    is_put_aside: bool = False

    def results(self, work: Work, finisher: ThreadPoolExecutor) -> Iterator[ShardResult]:
        """Make what waits and finish what is made, until nothing is left or somebody asks to stop."""
        while (task := self._next()) or self.behind:
            if task:
                try:
                    self.behind.append((task, finisher.submit(work.make(task.shard, task.attempt).finish)))
                except Exception as error:
                    yield from self._failed(task, error)
            if len(self.behind) > (1 if task else 0):
                yield from self._settle()  # which may have to be tried again

    @property
    def _is_over(self) -> bool:
        return self.is_put_aside or self.stop.is_requested

    def _next(self) -> Task | None:
        return None if self._is_over else self.queue.next()

    def _settle(self) -> Iterator[ShardResult]:
        """Wait for the shard that was made first."""
        task, future = self.behind.popleft()
        try:
            result = future.result()
        except Exception as error:
            yield from self._failed(task, error)
            return
        self.queue.done(task)
        self.outage.end()
        self.rest.reset()
        yield result

    def _failed(self, task: Task, error: Exception) -> Iterator[ShardResult]:
        """Have a shard tried again, unless that is in vain. Raises: the error of all shards, Interrupted."""
        kind = kind_of(error)
        if kind in ("fatal", "lost"):
            raise error
        if kind == "failed":
            if given_up := self.queue.failed(task, describe(error)):
                yield given_up
            return
        self.queue.put_aside(task)
        if kind == "stopped":
            self.is_put_aside = True
            return
        self.outage.meet(f"shard {task.shard.index}", describe(error))
        with suppress(Interrupted):  # by the stop, which the loop sees
            self.stop.sleep(self.rest.begin())


@contextmanager
def _told_to_stop(work: Work, stop: Stop) -> Iterator[None]:
    """Pass a request to stop on to work that is busy on this thread."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(LOOK_S):
            if stop.is_requested:
                work.stop()
                return

    watcher = threading.Thread(target=watch, name="stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
