"""The engine without a cluster: one worker in this process, one shard after the other. For tests and one device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from flux_batch.engine.outage import FIRST_REST_S, Outage, Rest
from flux_batch.engine.protocol import Runner, Work, describe, kind_of
from flux_batch.engine.shard_queue import ShardQueue
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
        queue = ShardQueue(shards, self.max_attempts)
        outage, rest = Outage(self.outage_s), Rest(self.rest_s)
        with _told_to_stop(work, stop):
            while not stop.is_requested and (task := queue.next()):
                try:
                    result = work(task.shard, task.attempt)
                except Exception as error:
                    kind = kind_of(error)
                    if kind in ("fatal", "lost"):
                        raise
                    if kind == "failed":
                        if given_up := queue.failed(task, describe(error)):
                            yield given_up
                        continue
                    queue.put_aside(task)
                    if kind == "stopped":
                        return
                    outage.meet(f"shard {task.shard.index}", describe(error))
                    with suppress(Interrupted):  # by the stop, which the loop sees
                        stop.sleep(rest.begin())
                else:
                    queue.done(task)
                    outage.end()
                    rest.reset()
                    yield result


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
