"""A simulated cluster whose workers only take simulated time: the driver's work counts, its waiting does not.

The clock shows the processor time of this process, and jumps to the next answer when the driver waits for one. So a
driver that is too slow for its workers leaves them idle, as on a real cluster.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from flux_batch.engine.failure import Failure
from flux_batch.records import Attempt, Shard, ShardResult
from flux_batch.telemetry import WorkerFigures

_STOPPED = Failure("stopped", "put aside")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The durations on a simulated cluster, in seconds.

    Shards take `shard_s` on average, the longest `spread` times as long as the shortest. A share `slow_share` of the
    workers takes `slow_factor` times as long for each shard.
    """

    shard_s: float
    finish_s: float
    open_s: float
    spread: float = 1.0
    slow_share: float = 0.0
    slow_factor: float = 1.0

    def seconds(self, shard: int) -> float:
        """Return the seconds of a shard, drawn from its number; the logarithms are uniformly distributed."""
        if self.spread == 1:
            return self.shard_s
        mean = (self.spread - 1) / math.log(self.spread)
        return float(self.shard_s * self.spread ** random.Random(shard).random() / mean)


class SimulatedCluster:
    """A cluster of simulated workers, as a pool uses it."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.node = "head"
        self.workers: list[SimulatedWorker] = []
        self.num_answers = 0
        self.making: dict[int, SimulatedWorker] = {}  # the last worker that began each shard
        self._skipped_s = -time.process_time()
        self._waited_s = 0.0
        self._numbers = itertools.count()
        self._coming: list[tuple[float, int, Future[Any], Any]] = []

    @property
    def driver_s(self) -> float:
        """The processor time of the driver, in seconds since the start."""
        return self.clock() - self._waited_s

    def clock(self) -> float:
        """Return the time, in seconds since the start."""
        return time.process_time() + self._skipped_s

    def answer(self, call: Future[Any], after_s: float, answer: Any) -> None:
        """Answer a call after some seconds, unless it has an answer by then."""
        heappush(self._coming, (self.clock() + after_s, next(self._numbers), call, answer))

    def start_actor(self) -> SimulatedWorker:
        """Start one more worker."""
        self.workers.append(SimulatedWorker(self, len(self.workers)))
        return self.workers[-1]

    def call(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of a worker; its answer comes at its simulated time."""
        call = Future[Any]()
        method(call, *arguments)
        return call

    ask = call

    def wait(self, timeout_s: float) -> list[Future[Any]]:
        """Wait until a call is answered: the clock jumps to the answer or to the end of the timeout."""
        until = self.clock() + timeout_s
        skipped_s = max(0.0, min(until, self._coming[0][0] if self._coming else until) - self.clock())
        self._skipped_s += skipped_s
        self._waited_s += skipped_s
        answered = []
        while self._coming and self._coming[0][0] <= self.clock():
            _, _, call, answer = heappop(self._coming)
            if not call.done():
                call.set_result(answer)
                answered.append(call)
        self.num_answers += len(answered)
        return answered

    def kill(self, actor: SimulatedWorker) -> None:
        """End a worker."""
        actor.end()

    def check(self) -> None:
        """Return at once: this cluster answers."""

    def caused_loss(self, node: str, error: BaseException | None) -> bool:
        """Return False: no node leaves."""
        return False

    def leaving_nodes(self) -> set[str]:
        """Return nothing: no node leaves."""
        return set()

    def resources(self) -> Mapping[str, float]:
        """Return the amount of each resource."""
        return {"GPU": len(self.workers), "CPU": len(self.workers)}


class SimulatedWorker:
    """An actor that makes one shard and finishes others, which only takes time. busy_s: the time of making."""

    def __init__(self, cluster: SimulatedCluster, number: int) -> None:
        timing = cluster.timing
        is_slow = random.Random(-1 - number).random() < timing.slow_share
        self.busy_s = 0.0
        self.cluster = cluster
        self.number = number
        self._pace = timing.slow_factor if is_slow else 1.0
        self._making = Future[Any]()
        self._made_at = 0.0
        self._finished_at = 0.0

    def open(self, call: Future[Any], after_s: float) -> None:
        """Load the model; starting processes in turn is not simulated."""
        self.cluster.answer(call, self.cluster.timing.open_s, None)

    def make(self, call: Future[Any], shard: Shard, attempt: Attempt) -> None:
        """Make a shard. If another worker has begun it, the two share the rest and end together."""
        other = self.cluster.making.get(shard.index)
        self.cluster.making[shard.index] = self
        seconds = self.cluster.timing.seconds(shard.index) * self._pace
        if other is not None and attempt.reverse_order and (left_s := other.left_s) > 0:
            seconds = left_s / (1 + other._pace / self._pace)
            other._make_until(seconds)
        self._making = call
        self._make_until(seconds)

    @property
    def left_s(self) -> float:
        """The seconds until its shard is made."""
        return max(0.0, self._made_at - self.cluster.clock())

    def _make_until(self, after_s: float) -> None:
        """Set the end of the current shard, in seconds from now."""
        self.busy_s += after_s - self.left_s
        self._made_at = self.cluster.clock() + after_s
        self.cluster.answer(self._making, after_s, None)

    def finish(self, call: Future[Any], index: int) -> None:
        """Finish a shard, after the earlier ones."""
        self.cluster.making.pop(index, None)
        now = self.cluster.clock()
        self._finished_at = max(now, self._finished_at) + self.cluster.timing.finish_s
        result = ShardResult(shard=index, worker=str(self.number), num_images=1, is_new=True)
        self.cluster.answer(call, self._finished_at - now, result)

    def stop(self, call: Future[Any]) -> None:
        """Stop the current shard."""
        self.cluster.answer(self._making, 0.0, _STOPPED)
        self.cluster.answer(call, 0.0, None)
        self.end()

    def end(self) -> None:
        """End the busy time."""
        self.busy_s = self.busy_until(self.cluster.clock())
        self._made_at = 0.0

    def busy_until(self, now: float) -> float:
        """Return the seconds of making until now."""
        return self.busy_s - max(0.0, self._made_at - now)

    def node_id(self, call: Future[Any]) -> None:
        """Return the id of its node: eight workers share one."""
        self.cluster.answer(call, 0.0, f"node-{self.number // 8}")

    def figures(self, call: Future[Any]) -> None:
        """Return its name, and no figures."""
        self.cluster.answer(call, 0.0, (str(self.number), WorkerFigures({})))

    def idle_s(self, call: Future[Any]) -> None:
        """Return the seconds without progress."""
        self.cluster.answer(call, 0.0, 0.0)
