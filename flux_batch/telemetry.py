"""Running figures of a process, which whoever watches it may read at any time; knows no watcher."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class CounterKey(NamedTuple):
    """The name of a counter and its label, such as the type of an error; "" for a counter without labels."""

    name: str
    label: str = ""


class Metrics:
    """Counters that only grow and gauges that rise and fall; safe to use from several threads.

    run: the name of the run that they belong to.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._counters: Counter[CounterKey] = Counter()
        self._gauges: Counter[str] = Counter()

    def add(self, counter: str, amount: float = 1, label: str = "") -> None:
        """Add an amount to a counter."""
        with self._lock:
            self._counters[CounterKey(counter, label)] += amount  # type: ignore[assignment]  # seconds are floats

    def gauge_add(self, gauge: str, amount: int) -> None:
        """Add an amount, which may be negative, to a gauge."""
        with self._lock:
            self._gauges[gauge] += amount

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to the counter `stage_seconds`, after an error too."""
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
    """The metrics of a worker, with the seconds of one shard by stage beside them."""

    def __init__(self, of_worker: Metrics) -> None:
        self.of_worker = of_worker
        self._own = Metrics(of_worker.run)

    def gauge_add(self, gauge: str, amount: int) -> None:
        """Add an amount to a gauge of the worker."""
        self.of_worker.gauge_add(gauge, amount)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to those of the worker, and of the shard."""
        with self.of_worker.timed(stage), self._own.timed(stage):
            yield

    def stage_s(self) -> dict[str, float]:
        """Return the seconds of the shard by stage."""
        return {key.label: seconds for key, seconds in self._own.counters().items()}


class Heartbeat:
    """The last sign of progress of each activity that is under way; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}

    @contextmanager
    def busy(self, activity: str) -> Iterator[None]:
        """Expect signs of progress from an activity, which the block carries out."""
        with self._lock:
            self._last[activity] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._last.pop(activity, None)

    def beat(self, activity: str | None = None) -> None:
        """Record progress of an activity; without a name, of every activity under way."""
        with self._lock:
            for name in [activity] if activity else list(self._last):
                if name in self._last:
                    self._last[name] = time.monotonic()

    def idle_s(self) -> float:
        """Return the seconds since the last sign of the activity that is silent longest; 0 if none is under way."""
        with self._lock:
            return max((time.monotonic() - last for last in self._last.values()), default=0.0)
