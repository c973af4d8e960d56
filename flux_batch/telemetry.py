"""What a process has done so far, in running sums that whoever watches it may read at any time; knows no watcher."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Sum(NamedTuple):
    """Which sum: what it counts, and of what kind, such as the type of an error; "" if all are of one kind."""

    name: str
    kind: str = ""


class Tally:
    """Sums that only grow, and levels that go up and down; safe to use from several threads.

    run: the name of the run that they are of.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._sums: Counter[Sum] = Counter()
        self._levels: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1, kind: str = "") -> None:
        """Let a sum grow."""
        with self._lock:
            self._sums[Sum(name, kind)] += amount  # type: ignore[assignment]  # of seconds too

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that something takes to those of a stage, also if it fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add("stage_seconds", time.monotonic() - started, stage)

    def shift(self, level: str, by: int) -> None:
        """Let a level rise or fall."""
        with self._lock:
            self._levels[level] += by

    def sums(self) -> dict[Sum, float]:
        """Read the sums."""
        with self._lock:
            return dict(self._sums)

    def levels(self) -> dict[str, float]:
        """Read the levels."""
        with self._lock:
            return dict(self._levels)


class Pulse:
    """Remembers the last sign of progress; one attribute, so that any thread may give and read it."""

    def __init__(self) -> None:
        self._last: float | None = None

    def beat(self) -> None:
        """Give a sign of progress."""
        if self._last is not None:
            self._last = time.monotonic()

    def quiet_s(self) -> float:
        """Tell how long ago the last sign was, in seconds; 0 while there is nothing to do."""
        last = self._last
        return 0.0 if last is None else time.monotonic() - last

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Expect signs of progress from now until the work is done."""
        self._last = time.monotonic()
        try:
            yield
        finally:
            self._last = None
