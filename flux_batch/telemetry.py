"""Counters, gauges and worker states of a running process; other code may read them at any time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


class CounterKey(NamedTuple):
    """The name of a counter and its label, such as the type of an error; "" for a counter without labels."""

    name: str
    label: str = ""


class ShardCount(NamedTuple):
    """The number of images of a shard that is not committed.

    num_images: the images that the rows read so far request. num_done: those made or failed. num_adopted: those of
    num_done that an earlier attempt made. failures: the failed ones by error type.
    """

    num_images: int = 0
    num_done: int = 0
    num_adopted: int = 0
    failures: Mapping[str, int] = {}  # never changed


class WorkerFigures(NamedTuple):
    """The figures of a worker: the count of each shard in hand, and the seconds spent making images."""

    in_hand: Mapping[int, ShardCount]
    busy_s: float = 0.0


class Metrics:
    """Counters, which only grow, and gauges, which rise and fall; thread-safe.

    run: the name of their run.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._counters: Counter[CounterKey] = Counter()
        self._gauges: Counter[str] = Counter()
        self._in_hand: dict[int, ShardCount] = {}

    def add(self, counter: str, amount: float = 1, label: str = "") -> None:
        """Add an amount to a counter."""
        with self._lock:
            self._counters[CounterKey(counter, label)] += amount  # type: ignore[assignment]  # seconds are floats

    def gauge_add(self, gauge: str, amount: int) -> None:
        """Add an amount, which may be negative, to a gauge."""
        with self._lock:
            self._gauges[gauge] += amount

    def count_shard(self, shard: int, count: ShardCount) -> None:
        """Replace the count of a shard that is in hand."""
        with self._lock:
            self._in_hand[shard] = count

    def put_down(self, shard: int) -> None:
        """Remove a shard that is finished or put aside."""
        with self._lock:
            self._in_hand.pop(shard, None)

    def figures(self) -> WorkerFigures:
        """Return the present figures."""
        with self._lock:
            return WorkerFigures(dict(self._in_hand), self._counters[CounterKey("stage_seconds", "make")])

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent in the block to the counter `stage_seconds`, after an error too."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add("stage_seconds", time.monotonic() - started, stage)

    def counters(self) -> dict[CounterKey, float]:
        """Return a copy of the counters."""
        with self._lock:
            return dict(self._counters)

    def gauges(self) -> dict[str, float]:
        """Return a copy of the gauges."""
        with self._lock:
            return dict(self._gauges)


class ShardMetrics:
    """The metrics of a worker, and the seconds of one shard by stage."""

    def __init__(self, of_worker: Metrics) -> None:
        self.of_worker = of_worker
        self._own = Metrics(of_worker.run)

    def gauge_add(self, gauge: str, amount: int) -> None:
        """Add an amount to a gauge of the worker."""
        self.of_worker.gauge_add(gauge, amount)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent in the block to those of worker and shard."""
        with self.of_worker.timed(stage), self._own.timed(stage):
            yield

    def stage_s(self) -> dict[str, float]:
        """Return the seconds of the shard by stage."""
        return {key.label: seconds for key, seconds in self._own.counters().items()}


class Heartbeat:
    """The time of the last progress of each running activity; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}

    @contextmanager
    def busy(self, activity: str) -> Iterator[None]:
        """Expect progress from an activity while the block runs."""
        with self._lock:
            self._last[activity] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._last.pop(activity, None)

    def beat(self, activity: str | None = None) -> None:
        """Record progress of an activity; without a name, of every running activity."""
        with self._lock:
            for name in [activity] if activity else list(self._last):
                if name in self._last:
                    self._last[name] = time.monotonic()

    def idle_s(self) -> float:
        """Return the longest time without progress of any running activity, in seconds; 0 if none runs."""
        with self._lock:
            return max((time.monotonic() - last for last in self._last.values()), default=0.0)


# The heartbeat while this process loads its model: downloads and waits, which may take hours, record progress here.
LOADING = Heartbeat()


@dataclass(eq=False)
class WorkerState:
    """A worker as its engine sees it; times are values of time.monotonic().

    placed_at: the time when its process got its device. up_at: the time when its model was loaded. in_hand: the last
    known count of each shard that it makes or finishes. began_at: the time when it began each of them.
    """

    number: int
    name: str = ""
    placed_at: float | None = None
    up_at: float | None = None
    busy_s: float = 0.0
    in_hand: dict[int, ShardCount] = field(default_factory=dict)
    began_at: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # figures are read while shards change

    def begin(self, shard: int) -> None:
        """Add a shard that the worker begins."""
        with self._lock:
            self.began_at[shard] = time.monotonic()
            self.in_hand[shard] = ShardCount()

    def end(self, shard: int) -> None:
        """Remove a shard that the worker has finished or put aside."""
        with self._lock:
            self.began_at.pop(shard, None)
            self.in_hand.pop(shard, None)

    def update(self, figures: WorkerFigures) -> None:
        """Replace the figures. A shard keeps its last count until the engine knows how it ended."""
        self.busy_s = figures.busy_s
        with self._lock:
            self.in_hand.update((shard, figures.in_hand[shard]) for shard in figures.in_hand.keys() & self.in_hand)


class EngineState:
    """The state of an engine; other code may read it at any time.

    `waiting_for` says what all workers wait for, e.g. "the model to load"; it is empty while a worker works.
    """

    def __init__(self) -> None:
        self.waiting_for = ""
        self.workers: tuple[WorkerState, ...] = ()
        self.first_began_at: float | None = None  # when the first shard began, by time.monotonic()
        self._num_started = 0
        self._makers: dict[int, list[WorkerState]] = {}  # the workers that make each shard
        self._ended_s = 0.0

    def start(self) -> WorkerState:
        """Add a new worker."""
        self._num_started += 1
        worker = WorkerState(self._num_started)
        self.workers = (*self.workers, worker)
        return worker

    def begin(self, worker: WorkerState, shard: int) -> None:
        """Record that a worker begins a shard."""
        worker.begin(shard)
        self._makers.setdefault(shard, []).append(worker)
        if self.first_began_at is None:
            self.first_began_at = worker.began_at[shard]

    def settle(self, shard: int) -> None:
        """Remove a shard from all its workers, since its result is known."""
        for worker in self._makers.pop(shard, ()):
            worker.end(shard)

    def end(self, worker: WorkerState) -> None:
        """Remove a worker."""
        if worker in self.workers:
            self._ended_s += _since(worker.placed_at)
            self.workers = tuple(each for each in self.workers if each is not worker)

    @property
    def worker_s(self) -> float:
        """The total seconds for which workers have held their devices."""
        return self._ended_s + sum(_since(worker.placed_at) for worker in self.workers)


def _since(moment: float | None) -> float:
    return 0.0 if moment is None else time.monotonic() - moment
